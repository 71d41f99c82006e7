//! New qcow2 images, judged by qemu-img beside a twin that qemu-img made with the same options.

mod support;

use disk::{ErrorKind, Preallocation};
use formats::qcow2::check::check;
use formats::qcow2::{CreateOptions, Header, create, measure};
use support::{Place, load, qemu_img, qemu_img_json, qemu_img_ok, qemu_io, run};
use testkit::{CrashStorage, MemoryStorage};

fn parse(size: u64, options: &str) -> disk::Result<CreateOptions> {
    CreateOptions::parse(size, options.split(',').filter(|o| !o.is_empty()).map(|o| o.split_once('=').expect("k=v")))
}

/// Makes `ours.qcow2` and `twin.qcow2`; returns whether both sides could.
fn make_both(place: &Place, size: u64, options: &str) {
    let ours = parse(size, options).unwrap_or_else(|e| panic!("{options}: {e:?}"));
    let memory = MemoryStorage::new(0);
    let data = ours.data_file.as_ref().map(|_| MemoryStorage::new(0));
    let data_handle = data.as_ref().map(MemoryStorage::handle);
    let header = run(create(&memory.handle(), data_handle.as_ref(), &ours)).unwrap_or_else(|e| panic!("{e:?}"));
    assert_eq!(run(Header::read(&memory.handle())).expect("own header can be read").l1_offset, header.l1_offset);
    memory.write_to(&place.path("ours.qcow2")).expect("file");
    let mut theirs = options.to_owned();
    if let (Some(data), Some(name)) = (data, &ours.data_file) {
        data.write_to(&place.path(name)).expect("file");
        theirs = theirs.replace(name.as_str(), "twin.raw");
    }
    let mut args = vec!["create", "-q", "-f", "qcow2"];
    if !theirs.is_empty() {
        args.extend(["-o", &theirs]);
    }
    let size = size.to_string();
    args.extend(["twin.qcow2", &size]);
    qemu_img_ok(place.dir(), &args);
}

fn judge(place: &Place, options: &str) {
    let (check, code) = qemu_img_json(place.dir(), &["check", "--output=json", "ours.qcow2"]);
    assert_eq!(code, 0, "{options}: {check}");
    let (ours, _) = qemu_img_json(place.dir(), &["info", "--output=json", "ours.qcow2"]);
    let (twin, _) = qemu_img_json(place.dir(), &["info", "--output=json", "twin.qcow2"]);
    for key in ["virtual-size", "cluster-size", "backing-filename", "backing-filename-format", "dirty-flag"] {
        assert_eq!(ours[key], twin[key], "{options}: {key}");
    }
    let without_name = |info: &serde_json::Value| {
        let mut specific = info["format-specific"].clone();
        if let Some(data) = specific["data"].as_object_mut() {
            data.remove("data-file");
        }
        specific
    };
    assert_eq!(without_name(&ours), without_name(&twin), "{options}");
    qemu_img_ok(place.dir(), &["compare", "-f", "qcow2", "-F", "qcow2", "ours.qcow2", "twin.qcow2"]);
    let (map, _) = qemu_img_json(place.dir(), &["map", "--output=json", "ours.qcow2"]);
    let (twin_map, _) = qemu_img_json(place.dir(), &["map", "--output=json", "twin.qcow2"]);
    let summary = |map: &serde_json::Value| -> Vec<(u64, bool)> {
        let mut runs: Vec<(u64, bool)> = Vec::new();
        for e in map.as_array().expect("array") {
            let (len, data) = (e["length"].as_u64().expect("length"), e["data"].as_bool().expect("data"));
            match runs.last_mut() {
                Some(last) if last.1 == data => last.0 += len,
                _ => runs.push((len, data)),
            }
        }
        runs
    };
    // Holes of preallocated files depend on who made them.
    if !options.contains("preallocation") && !options.contains("data_file_raw") {
        assert_eq!(summary(&map), summary(&twin_map), "{options}");
    }
    // A writer of the other house must find its way in what we made.
    qemu_io(place.dir(), "ours.qcow2", &["write -P 7 0 4k", "write -P 9 70000 100000", "flush"]);
    qemu_io(place.dir(), "ours.qcow2", &["read -P 7 0 4k", "read -P 9 70000 100000"]);
    let (check, code) = qemu_img_json(place.dir(), &["check", "--output=json", "ours.qcow2"]);
    assert_eq!(code, 0, "{options}: after writes: {check}");
}

#[test]
fn every_option_gives_qemu_imgs_image() {
    let cases = [
        "",
        "compat=0.10",
        "compat=1.1,lazy_refcounts=on",
        "compat=0.10,cluster_size=512",
        "cluster_size=512",
        "cluster_size=4k",
        "cluster_size=2M",
        "refcount_bits=1",
        "refcount_bits=2",
        "refcount_bits=8,cluster_size=1k",
        "refcount_bits=64,cluster_size=512",
        "compression_type=zstd",
        "extended_l2=on",
        "extended_l2=on,cluster_size=16k",
        "extended_l2=on,cluster_size=2M,compression_type=zstd",
        "preallocation=metadata",
        "preallocation=metadata,cluster_size=512",
        "preallocation=metadata,cluster_size=512,refcount_bits=64",
        "preallocation=metadata,cluster_size=2M,refcount_bits=1",
        "preallocation=metadata,compat=0.10",
        "preallocation=metadata,extended_l2=on",
        "preallocation=falloc",
        "preallocation=full",
        "preallocation=full,compat=0.10,cluster_size=4k",
        "data_file=ours.raw",
        "data_file=ours.raw,data_file_raw=on",
        "data_file=ours.raw,data_file_raw=on,extended_l2=on",
        "data_file=ours.raw,preallocation=metadata",
        "data_file=ours.raw,preallocation=full",
    ];
    for options in cases {
        for size in [1 << 20, (9 << 20) + 512] {
            let place = Place::new();
            make_both(&place, size, options);
            judge(&place, options);
        }
    }
}

#[test]
fn backing_reference() {
    let place = Place::new();
    qemu_img_ok(place.dir(), &["create", "-q", "-f", "raw", "base.raw", "1M"]);
    for options in [
        "backing_file=base.raw,backing_fmt=raw",
        "backing_file=base.raw,backing_fmt=raw,compat=0.10,cluster_size=512",
        "backing_file=base.raw,backing_fmt=raw,extended_l2=on,preallocation=metadata",
    ] {
        make_both(&place, 2 << 20, options);
        judge(&place, options);
    }
}

#[test]
fn sizes_from_nothing_to_the_bound() {
    for size in [0, 512, 1 << 40] {
        let place = Place::new();
        make_both(&place, size, "");
        let (check, code) = qemu_img_json(place.dir(), &["check", "--output=json", "ours.qcow2"]);
        assert_eq!(code, 0, "{check}");
        qemu_img_ok(place.dir(), &["compare", "ours.qcow2", "twin.qcow2"]);
    }
    let place = Place::new();
    make_both(&place, 128 << 30, "cluster_size=512");
    let (check, code) = qemu_img_json(place.dir(), &["check", "--output=json", "ours.qcow2"]);
    assert_eq!(code, 0, "{check}");
    let error = parse((128 << 30) + 512, "cluster_size=512").expect_err("an L1 table of more than 32 MiB");
    assert_eq!(error.kind(), ErrorKind::Invalid);
}

#[test]
fn large_preallocation_is_streamed() {
    let place = Place::new();
    make_both(&place, 8 << 30, "preallocation=metadata,cluster_size=64k,refcount_bits=64");
    let (check, code) = qemu_img_json(place.dir(), &["check", "--output=json", "ours.qcow2"]);
    assert_eq!(code, 0, "{check}");
    assert_eq!(check["allocated-clusters"], 131_072);
    assert_eq!(check["fragmented-clusters"].as_u64().unwrap_or(0), 0);
}

#[test]
fn new_image_over_old_bytes() {
    let old = MemoryStorage::new(0);
    run(async { old.handle().write(0, disk::Buf::copy_of(&vec![0xa5; 2 << 20])).await }).expect("write");
    run(create(&old.handle(), None, &CreateOptions::new(1 << 20))).expect("created");
    let place = Place::new();
    old.write_to(&place.path("ours.qcow2")).expect("file");
    qemu_img_ok(place.dir(), &["check", "ours.qcow2"]);
    qemu_io(place.dir(), "ours.qcow2", &["read -P 0 0 1M"]);
}

#[test]
fn a_crash_leaves_no_image_or_a_good_one() {
    let options = parse(4 << 20, "preallocation=metadata").expect("valid");
    let whole = MemoryStorage::new(0);
    run(create(&whole.handle(), None, &options)).expect("created");
    let writes = whole.counters().writes;
    assert!(writes > 3);
    let (mut none, mut good) = (0, 0);
    for pass in 0..=writes {
        let old = MemoryStorage::new(0);
        run(create(&old.handle(), None, &CreateOptions::new(1 << 20))).expect("an older image");
        let storage = CrashStorage::of(old);
        storage.memory().fail_from(Some(disk::Operation::Write), pass, ErrorKind::Io);
        // The last round ends without its last sync, with the header perhaps there and perhaps not.
        if pass == writes {
            storage.memory().fail_from(Some(disk::Operation::Flush), 2, ErrorKind::Io);
        }
        run(create(&storage.handle(), None, &options)).expect_err("the fault");
        for seed in 0..8 {
            let left = storage.crash(seed).handle();
            match run(check(&left, None, &mut |_, _| {})) {
                Ok(report) => {
                    assert!(report.is_clean(), "stopped at write {pass}, seed {seed}: {report:?}");
                    good += 1;
                }
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error:?}");
                    none += 1;
                }
            }
        }
    }
    assert!(none > 0 && good > 0, "{none} {good}");
}

#[test]
fn options_are_refused_as_by_qemu_img() {
    let place = Place::new();
    qemu_img_ok(place.dir(), &["create", "-q", "-f", "raw", "base.raw", "1M"]);
    for options in [
        "cluster_size=256",
        "cluster_size=4M",
        "cluster_size=3000",
        "refcount_bits=3",
        "refcount_bits=128",
        "refcount_bits=0",
        "compat=0.10,refcount_bits=8",
        "compat=0.10,lazy_refcounts=on",
        "compat=0.10,extended_l2=on",
        "compat=0.10,compression_type=zstd",
        "compat=0.10,data_file=d.raw",
        "compat=2",
        "extended_l2=on,cluster_size=8k",
        "data_file_raw=on",
        "preallocation=some",
        "lazy_refcounts=perhaps",
        "backing_file=base.raw,backing_fmt=raw,preallocation=metadata",
        "backing_file=base.raw,backing_fmt=raw,data_file=d.raw,data_file_raw=on",
        "backing_file=base.raw",
        "colour=red",
    ] {
        let error = parse(1 << 20, options).expect_err(options);
        assert_eq!(error.kind(), ErrorKind::Invalid, "{options}");
        let output = qemu_img(place.dir(), &["create", "-q", "-f", "qcow2", "-o", options, "x.qcow2", "1M"]);
        assert!(!output.status.success(), "qemu-img accepts {options}, we say: {error}");
    }
    let error = parse(1 << 20, "colour=red").expect_err("unknown");
    assert!(error.to_string().contains("cluster_size"), "lists the known ones: {error}");
    assert_eq!(parse(1 << 20, "encryption=on").expect_err("encryption").kind(), ErrorKind::Unsupported);
}

#[test]
fn sizes_are_read_as_by_qemu_img() {
    for (text, bytes) in [("64k", 65536), ("0.5M", 512 << 10), ("512", 512), ("2M", 2 << 20), ("1K", 1024)] {
        assert_eq!(parse(0, &format!("cluster_size={text}")).expect(text).cluster_size, bytes);
    }
    assert_eq!(parse(1000, "").expect("rounded up").size, 1024);
    for text in ["", "k", "1.k", "1.5", "12q", "99999999999999999999", "16E0", "-1"] {
        assert!(parse(0, &format!("size={text}")).is_err(), "{text}");
    }
    assert_eq!(parse(0, "preallocation=falloc").expect("valid").preallocation, Preallocation::Falloc);
}

#[test]
fn measure_says_what_qemu_img_says() {
    let place = Place::new();
    for (size, options) in [
        (1 << 30, ""),
        (0, ""),
        ((1 << 30) + 512, "cluster_size=512"),
        (1 << 40, "cluster_size=2M,refcount_bits=1"),
        (5 << 30, "refcount_bits=64,cluster_size=4k"),
        (5 << 30, "extended_l2=on"),
        (1 << 30, "preallocation=full"),
        (1 << 30, "preallocation=metadata"),
    ] {
        let ours = measure(&parse(size, options).expect(options), []).expect(options);
        let text = size.to_string();
        let mut args = vec!["measure", "--output=json", "-O", "qcow2", "--size", &text];
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        let (theirs, _) = qemu_img_json(place.dir(), &args);
        assert_eq!(theirs["required"], ours.required, "{size} {options}");
        assert_eq!(theirs["fully-allocated"], ours.fully_allocated, "{size} {options}");
    }
    // From a disk with data here and there.
    qemu_img_ok(place.dir(), &["create", "-q", "-f", "qcow2", "src.qcow2", "64M"]);
    qemu_io(place.dir(), "src.qcow2", &["write 0 4k", "write 10M 1M", "write -z 20M 1M", "write 33000k 64k"]);
    let (map, _) = qemu_img_json(place.dir(), &["map", "--output=json", "src.qcow2"]);
    let data: Vec<disk::ByteRange> = map
        .as_array()
        .expect("array")
        .iter()
        .filter(|e| e["data"] == true)
        .map(|e| disk::ByteRange::new(e["start"].as_u64().expect("start"), e["length"].as_u64().expect("length")))
        .collect();
    assert!(data.len() >= 3);
    let ours = measure(&parse(64 << 20, "").expect("valid"), data).expect("measured");
    let (theirs, _) = qemu_img_json(place.dir(), &["measure", "--output=json", "-O", "qcow2", "src.qcow2"]);
    assert_eq!(theirs["required"], ours.required);
    assert_eq!(theirs["fully-allocated"], ours.fully_allocated);
}

#[test]
fn files_of_qemu_img_are_written_back_as_they_were() {
    let place = Place::new();
    qemu_img_ok(place.dir(), &["create", "-q", "-f", "raw", "base.raw", "1M"]);
    for options in [
        "compat=0.10",
        "cluster_size=512",
        "compression_type=zstd",
        "extended_l2=on",
        "data_file=d.raw,data_file_raw=on",
        "backing_file=base.raw,backing_fmt=raw",
        "backing_file=base.raw,backing_fmt=raw,compat=0.10",
    ] {
        qemu_img_ok(place.dir(), &["create", "-q", "-f", "qcow2", "-o", options, "x.qcow2", "4M"]);
        if !options.contains("compat") && !options.contains("data_file") {
            qemu_img_ok(place.dir(), &["bitmap", "--add", "x.qcow2", "one"]);
        }
        let (memory, handle) = load(&place.path("x.qcow2"));
        let before = memory.to_vec();
        let header = run(Header::read(&handle)).unwrap_or_else(|e| panic!("{options}: {e:?}"));
        run(header.write(&handle)).expect("written");
        let after = memory.to_vec();
        let at = before.iter().zip(&after).position(|(a, b)| a != b);
        assert_eq!((at, before.len()), (None, after.len()), "{options}");
    }
}
