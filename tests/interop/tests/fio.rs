//! fio's NBD engine with verification, over image kinds, cache modes, I/O backends and queue depths.

use interop::{Server, assert_sound, missing, pattern_file, qemu_img, run};
use std::path::Path;

/// Three jobs one after the other, each on 4 MiB of its own, which is written at random and read back.
fn verify(server: &Server, directory: &Path) {
    let mut jobs = String::from(
        "[global]\nioengine=nbd\nrw=randwrite\nverify=crc32c\nverify_fatal=1\ndo_verify=1\nverify_state_save=0\n",
    );
    jobs += &format!("uri={}\nsize=4M\nbsrange=512-16k\nbs_unaligned=0\nblockalign=512\nfsync=200\n", server.uri);
    for (index, depth) in [1, 16, 32].into_iter().enumerate() {
        jobs += &format!("[depth-{depth}]\nstonewall\niodepth={depth}\noffset={}M\n", 4 * index);
    }
    let file = directory.join("jobs.fio");
    std::fs::write(&file, jobs).expect("the jobs can be written");
    run("fio", &["--output-format=terse", file.to_str().expect("a path in UTF-8")]);
}

fn matrix(format: &str, options: Option<&str>, with_parent: bool) {
    if missing(&["fio", "qemu-img"]).is_some() {
        return;
    }
    for cache in ["none", "writeback"] {
        for backend in ["uring", "threads"] {
            let directory = tempfile::tempdir().expect("a directory");
            let image = directory.path().join(format!("disk.{format}"));
            let name = image.to_str().expect("a path in UTF-8");
            let parent = directory.path().join("parent.raw");
            let parent_name = parent.to_str().expect("a path in UTF-8");
            let mut args = vec!["create", "-q", "-f", format];
            if let Some(options) = options {
                args.extend(["-o", options]);
            }
            if with_parent {
                pattern_file(&parent, 16 << 20, 1);
                args.extend(["-b", parent_name, "-F", "raw"]);
            }
            args.extend([name, "16M"]);
            qemu_img(&args);
            let server = Server::start(&image, &["-f", format, "--cache", cache, "--io-backend", backend]);
            verify(&server, directory.path());
            server.stop();
            if format == "qcow2" {
                assert_sound(&image);
            }
        }
    }
}

#[test]
fn fio_verifies_raw() {
    matrix("raw", None, false);
}

#[test]
fn fio_verifies_qcow2() {
    matrix("qcow2", None, false);
}

#[test]
fn fio_verifies_qcow2_with_subclusters() {
    matrix("qcow2", Some("extended_l2=on,cluster_size=128k"), false);
}

#[test]
fn fio_verifies_qcow2_with_small_clusters() {
    matrix("qcow2", Some("cluster_size=4k"), false);
}

#[test]
fn fio_verifies_qcow2_over_a_parent() {
    matrix("qcow2", None, true);
}
