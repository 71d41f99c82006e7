//! A Linux guest in QEMU whose disk is our NBD export.

use interop::{Server, assert_equal, assert_sound, missing, qemu_img, run};
use std::path::Path;

const TOOLS: &[&str] = &["qemu-system-x86_64", "qemu-img", "busybox", "cpio", "mke2fs", "e2fsck"];

const FIRST_BOOT: &str = r#"
set -e
/bin/mke2fs -q -t ext4 /dev/vda
mount -t ext4 /dev/vda /mnt
for i in 1 2 3 4 5 6 7 8 9 10 11 12; do dd if=/dev/urandom of=/mnt/file$i bs=20k count=$i 2>/dev/null; done
rm /mnt/file3 /mnt/file6
mkdir /mnt/directory
cp /mnt/file12 /mnt/directory/copy
(cd /mnt && sha256sum file* directory/copy >SUMS)
sync
umount /mnt
echo "first boot: done"
"#;

const SECOND_BOOT: &str = r#"
set -e
mount -t ext4 /dev/vda /mnt
cd /mnt
test "$(wc -l <SUMS)" = 11
sha256sum -c SUMS >/dev/null
rm file12
echo "more" >later
cd /
umount /mnt
echo "second boot: all files as written"
"#;

fn boot(server: &Server, commands: &str) -> String {
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("boot-guest");
    let drive = format!("file={},format=raw,if=virtio,cache=none,discard=unmap", server.uri);
    let program = program.to_str().expect("a path in UTF-8");
    run(program, &["-t", "900", "-x", "mke2fs", "-a", "ext4", "-c", commands, "--", "-drive", &drive])
}

fn guest(format: &str, options: &[&str]) {
    if missing(TOOLS).is_some() {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let image = directory.path().join(format!("guest.{format}"));
    let name = image.to_str().expect("a path in UTF-8");
    interop::highwater(&[&["create", "-q", "-f", format], options, &[name, "96M"]].concat());

    let server = Server::start(&image, &["-f", format]);
    let first = boot(&server, FIRST_BOOT);
    assert!(first.contains("first boot: done"), "{first}");
    server.stop();
    let server = Server::start(&image, &["-f", format]);
    let second = boot(&server, SECOND_BOOT);
    assert!(second.contains("second boot: all files as written"), "{second}");
    server.stop();

    if format == "qcow2" {
        assert_sound(&image);
    }
    let raw = directory.path().join("guest.out");
    let raw_name = raw.to_str().expect("a path in UTF-8");
    qemu_img(&["convert", "-f", format, "-O", "raw", name, raw_name]);
    assert_equal(&image, format, &raw);
    run("e2fsck", &["-f", "-n", raw_name]);
}

#[test]
fn guest_finds_its_files_on_qcow2_after_a_reboot() {
    guest("qcow2", &[]);
}

#[test]
fn guest_finds_its_files_on_raw_after_a_reboot() {
    guest("raw", &[]);
}
