//! Random requests over several connections, against a shadow.

use interop::{Server, assert_equal, assert_sound, missing, pattern_file, python, qemu_img};

fn random(format: &str, options: Option<&str>, with_parent: bool, serve: &[&str], seed: u64) {
    if missing(&["python3-libnbd", "qemu-img"]).is_some() {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let (image, shadow) = (directory.path().join("disk"), directory.path().join("shadow.raw"));
    let parent = directory.path().join("parent.raw");
    let (name, shadow_name) = (image.to_str().expect("UTF-8"), shadow.to_str().expect("UTF-8"));
    let mut args = vec!["create", "-q", "-f", format];
    if let Some(options) = options {
        args.extend(["-o", options]);
    }
    if with_parent {
        // Shorter than its child: what lies behind its end is zeroes.
        pattern_file(&parent, 20 << 20, seed);
        args.extend(["-b", parent.to_str().expect("UTF-8"), "-F", "raw"]);
    }
    args.extend([name, "24M"]);
    qemu_img(&args);
    qemu_img(&["convert", "-f", format, "-O", "raw", name, shadow_name]);
    // Twice: the second server begins with what the first one left.
    for seed in [seed, seed + 1000] {
        let server = Server::start(&image, &[&["-f", format], serve].concat());
        python("random_writer.py", &[&server.uri, shadow_name, &seed.to_string(), "120", "4"]);
        server.stop();
        if format == "qcow2" {
            assert_sound(&image);
        }
        assert_equal(&image, format, &shadow);
    }
}

#[test]
fn random_requests_on_raw() {
    random("raw", None, false, &[], 1);
}

#[test]
fn random_requests_on_raw_with_direct_io() {
    random("raw", None, false, &["--cache", "none"], 2);
}

#[test]
fn random_requests_on_qcow2() {
    random("qcow2", None, false, &[], 3);
}

#[test]
fn random_requests_on_qcow2_with_direct_io() {
    random("qcow2", None, false, &["--cache", "none"], 4);
}

#[test]
fn random_requests_on_qcow2_over_a_parent() {
    random("qcow2", None, true, &["--io-backend", "threads"], 5);
}

#[test]
fn random_requests_on_qcow2_with_subclusters_over_a_parent() {
    random("qcow2", Some("extended_l2=on"), true, &["--cache", "none"], 6);
}

#[test]
fn random_requests_on_qcow2_with_the_smallest_clusters() {
    random("qcow2", Some("cluster_size=512,refcount_bits=1"), true, &[], 7);
}
