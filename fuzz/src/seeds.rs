//! The first inputs of a target's corpus.

use crate::bases::bases;
use std::path::PathBuf;

/// Writes the target's seeds into the folder that `HIGHWATER_SEEDS` names, if it names one. `fuzz/run` lets it name
/// the corpus.
///
/// # Panics
/// When the folder cannot be written to.
pub fn write_if_asked(target: &str) {
    let Some(folder) = std::env::var_os("HIGHWATER_SEEDS").map(PathBuf::from) else { return };
    let write = |name: String, bytes: &[u8]| std::fs::write(folder.join(name), bytes).expect("seeds can be written");
    match target {
        "nbd_negotiation" => write("seed-handshake".into(), &handshake()),
        "nbd_transmission" => (0..3).for_each(|choice| write(format!("seed-requests-{choice}"), &requests(choice))),
        "history_open" => crate::history::seeds(&write),
        _ => qcow2(&write),
    }
}

fn qcow2(write: &dyn Fn(String, &[u8])) {
    // Kind, offset (3 bytes), length (2 bytes): one of each kind, some in one cluster.
    let ops: Vec<u8> = (0..16u8).flat_map(|kind| [kind, 0, kind.wrapping_mul(40), 0, 4, kind]).collect();
    for (at, base) in bases().iter().enumerate() {
        let mode = at as u8 + 1;
        for flags in [0, 1, 2] {
            let mut bytes = vec![mode, flags, 16];
            bytes.extend_from_slice(&ops);
            write(format!("seed-{mode}-{flags}"), &bytes);
        }
        // The image itself, if it is small enough to be changed byte by byte.
        if base.image.size() <= 40 << 10 {
            let mut bytes = vec![0, 0, 16];
            bytes.extend_from_slice(&ops);
            bytes.extend_from_slice(&base.image.to_vec());
            write(format!("seed-image-{mode}"), &bytes);
        }
    }
}

fn handshake() -> Vec<u8> {
    let mut bytes = vec![0, 0, 0, 3];
    let mut option = |option: u32, data: &[u8]| {
        bytes.extend_from_slice(b"IHAVEOPT");
        bytes.extend_from_slice(&option.to_be_bytes());
        bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
        bytes.extend_from_slice(data);
    };
    option(8, &[]);
    option(3, &[]);
    option(11, &[]);
    option(10, b"\0\0\0\x04disk\0\0\0\x01\0\0\0\x0fbase:allocation");
    option(6, b"\0\0\0\x04disk\0\x02\0\x03\0\x01");
    option(7, b"\0\0\0\x04disk\0\0");
    bytes.extend_from_slice(&requests(2)[1..]);
    bytes
}

fn requests(choice: u8) -> Vec<u8> {
    let mut bytes = vec![choice];
    for command in 0..9u16 {
        if command == 2 {
            continue; // Ends the connection.
        }
        let magic: u32 = if choice == 2 { 0x21e4_1c71 } else { 0x2560_9513 };
        bytes.extend_from_slice(&magic.to_be_bytes());
        let flags: u16 = if choice == 2 && command == 1 { 1 << 5 } else { 0 };
        bytes.extend_from_slice(&flags.to_be_bytes());
        bytes.extend_from_slice(&command.to_be_bytes());
        bytes.extend_from_slice(&u64::from(command).to_be_bytes());
        bytes.extend_from_slice(&4096u64.to_be_bytes());
        match choice {
            2 => bytes.extend_from_slice(&512u64.to_be_bytes()),
            _ => bytes.extend_from_slice(&512u32.to_be_bytes()),
        }
        if command == 1 {
            bytes.extend_from_slice(&[7; 512]);
        }
    }
    bytes
}
