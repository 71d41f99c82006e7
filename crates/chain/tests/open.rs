//! Stacks that qemu-img made, opened through a gate.

use chain::{Access, Chain, MAX_DEPTH, OpenGate, ParentSpec, Reference, ReferenceKind, StackSpec, open};
use disk::{
    Buf, ByteRange, DiskError, DiskHandle, ErrorKind, LocalFuture, Operation, Result, StorageHandle, WriteFlags,
};
use formats::Format;
use std::cell::RefCell;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use testkit::{MemoryStorage, executor, judges};

/// Opens files of a directory as copies in memory; notes what it was asked.
struct Gate {
    opened: RefCell<HashMap<PathBuf, (MemoryStorage, Access)>>,
    asked: RefCell<Vec<(ReferenceKind, PathBuf)>>,
    deny: bool,
    change: fn(&Path, &MemoryStorage),
}

impl Gate {
    fn new() -> Self {
        Self { opened: RefCell::default(), asked: RefCell::default(), deny: false, change: |_, _| () }
    }

    fn access(&self, path: &Path) -> Access {
        self.opened.borrow()[&self.identity(path)].1
    }

    fn memory(&self, path: &Path) -> MemoryStorage {
        self.opened.borrow()[&self.identity(path)].0.clone()
    }
}

impl OpenGate for Gate {
    fn open_storage<'a>(&'a self, path: &'a Path, access: Access) -> LocalFuture<'a, Result<StorageHandle>> {
        Box::pin(async move {
            let memory = MemoryStorage::from_file(path)
                .map_err(|e| DiskError::from_io(e, Operation::Open).on(path.display().to_string()))?;
            let memory = memory.named(&path.display().to_string());
            (self.change)(path, &memory);
            let memory = if access == Access::ReadOnly { memory.read_only() } else { memory };
            self.opened.borrow_mut().insert(self.identity(path), (memory.clone(), access));
            Ok(memory.handle())
        })
    }

    fn allow(&self, reference: &Reference<'_>) -> Result<()> {
        self.asked.borrow_mut().push((reference.kind, reference.path.to_owned()));
        match self.deny {
            true => Err(DiskError::new(ErrorKind::Invalid, Operation::Open).because("the gate says no")),
            false => Ok(()),
        }
    }

    fn identity(&self, path: &Path) -> PathBuf {
        path.canonicalize().unwrap_or_else(|_| path.to_owned())
    }
}

/// A directory with `sub/base.raw` ← `mid.qcow2` ← `top.qcow2`, each with bytes of its own.
struct Images(tempfile::TempDir);

const SIZE: u64 = 4 << 20;

impl Images {
    fn new() -> Self {
        let images = Self(tempfile::tempdir().expect("a temporary directory"));
        std::fs::create_dir(images.path("sub")).expect("a directory");
        images.run(&["create", "-q", "-f", "raw", "sub/base.raw", "4M"]);
        images.io("raw", "sub/base.raw", "write -P 1 0 1M");
        images.run(&["create", "-q", "-f", "qcow2", "-b", "sub/base.raw", "-F", "raw", "mid.qcow2"]);
        images.io("qcow2", "mid.qcow2", "write -P 2 512k 1M");
        images.run(&["create", "-q", "-f", "qcow2", "-b", "./mid.qcow2", "-F", "qcow2", "top.qcow2"]);
        images.io("qcow2", "top.qcow2", "write -P 3 1280k 4k");
        images
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn spec(&self, name: &str, format: Format) -> StackSpec {
        StackSpec::new(self.path(name), format)
    }

    fn top(&self) -> StackSpec {
        self.spec("top.qcow2", Format::Qcow2)
    }

    fn run(&self, arguments: &[&str]) {
        let output = std::process::Command::new("qemu-img")
            .args(arguments)
            .current_dir(self.0.path())
            .output()
            .expect("qemu-img runs");
        assert!(output.status.success(), "qemu-img {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    fn io(&self, format: &str, name: &str, command: &str) {
        let output = std::process::Command::new("qemu-io")
            .args(["-f", format, "-c", command, name])
            .current_dir(self.0.path())
            .output()
            .expect("qemu-io runs");
        assert!(output.status.success(), "qemu-io {command}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// What QEMU reads from an image.
    fn as_qemu_reads(&self, name: &str, format: &str) -> Vec<u8> {
        self.run(&["convert", "-f", format, "-O", "raw", name, "out.raw"]);
        std::fs::read(self.path("out.raw")).expect("the converted image")
    }
}

async fn contents(chain: Chain) -> Vec<u8> {
    let disk = DiskHandle::new(chain);
    let size = disk.geometry().size as usize;
    disk.read(0, Buf::new(size)).await.expect("read").to_vec()
}

fn refused(spec: &StackSpec, gate: &Gate) -> DiskError {
    match executor::run(0, open(spec, gate)) {
        Ok(chain) => panic!("opened {:?}", chain.layers()),
        Err(error) => error,
    }
}

/// Fails with a message that holds all of `words`.
fn refused_with(spec: &StackSpec, gate: &Gate, kind: ErrorKind, words: &[&str]) {
    let error = refused(spec, gate);
    assert_eq!(error.kind(), kind, "{error}");
    for word in words {
        assert!(error.to_string().contains(word), "{word:?} is missing: {error}");
    }
}

#[test]
fn a_mixed_chain_reads_as_qemu_reads_it() {
    if !judges::available("qemu-img") {
        return;
    }
    let images = Images::new();
    let expected = images.as_qemu_reads("top.qcow2", "qcow2");
    let gate = Gate::new();
    executor::run(0, async {
        let chain = open(&images.top(), &gate).await.unwrap();
        let layers: Vec<_> = chain.layers().iter().map(|l| (l.path.clone(), l.format)).collect();
        assert_eq!(
            layers,
            [
                (images.path("top.qcow2"), Format::Qcow2),
                (images.path("mid.qcow2"), Format::Qcow2),
                (images.path("sub/base.raw"), Format::Raw)
            ]
        );
        assert!(contents(chain).await == expected);
    });
    assert_eq!(gate.access(&images.path("top.qcow2")), Access::ReadWrite);
    assert_eq!(gate.access(&images.path("mid.qcow2")), Access::ReadOnly);
    assert_eq!(gate.access(&images.path("sub/base.raw")), Access::ReadOnly);
    let asked: Vec<_> = gate.asked.borrow().iter().map(|(kind, _)| *kind).collect();
    assert_eq!(asked, [ReferenceKind::Parent, ReferenceKind::Parent]);
}

#[test]
fn writes_go_to_the_top_and_qemu_agrees() {
    if !judges::available("qemu-img") {
        return;
    }
    let images = Images::new();
    let gate = Gate::new();
    let mut expected = images.as_qemu_reads("top.qcow2", "qcow2");
    executor::run(0, async {
        let disk = DiskHandle::new(open(&images.top(), &gate).await.unwrap());
        for offset in [100_u64, 700_000, 1_310_000, 3_000_001] {
            expected[offset as usize..offset as usize + 70_000].fill(8);
            disk.write(offset, Buf::copy_of(&[8; 70_000]), WriteFlags::default()).await.unwrap();
        }
        let zeroes = ByteRange::new(200_000, 500_000);
        expected[200_000..700_000].fill(0);
        disk.write_zeroes(zeroes, disk::ZeroMode { unmap: true, fast_only: false }, WriteFlags::default())
            .await
            .unwrap();
        disk.close().await.unwrap();
    });
    gate.memory(&images.path("top.qcow2")).write_to(&images.path("top.qcow2")).unwrap();
    judges::check(&images.path("top.qcow2"), "qcow2").assert_clean();
    assert!(images.as_qemu_reads("top.qcow2", "qcow2") == expected);
}

#[test]
fn read_only_snapshots_and_parents_said_outright() {
    if !judges::available("qemu-img") {
        return;
    }
    let images = Images::new();
    let before = images.as_qemu_reads("top.qcow2", "qcow2");
    images.run(&["snapshot", "-c", "before", "top.qcow2"]);
    images.io("qcow2", "top.qcow2", "write -P 9 0 2M");
    executor::run(0, async {
        let gate = Gate::new();
        let spec = StackSpec { snapshot: Some("before".into()), ..images.top() };
        let chain = open(&spec, &gate).await.unwrap();
        assert!(disk::Disk::geometry(&chain).read_only, "a snapshot is read-only");
        assert_eq!(gate.access(&images.path("top.qcow2")), Access::ReadOnly);
        assert!(contents(chain).await == before);

        let gate = Gate::new();
        let alone = StackSpec { parent: ParentSpec::None, read_only: true, ..images.top() };
        let chain = open(&alone, &gate).await.unwrap();
        assert_eq!((chain.layers().len(), gate.asked.borrow().len()), (1, 0));
        let bytes = contents(chain).await;
        assert!(bytes[..2 << 20].iter().all(|b| *b == 9) && bytes[2 << 20..].iter().all(|b| *b == 0));

        let gate = Gate { deny: true, ..Gate::new() };
        let mut mid = images.spec("mid.qcow2", Format::Qcow2);
        mid.parent = ParentSpec::Explicit(Box::new(images.spec("sub/base.raw", Format::Raw)));
        let spec = StackSpec { parent: ParentSpec::Explicit(Box::new(mid)), ..images.top() };
        let chain = open(&spec, &gate).await.expect("what the spec names is not asked about");
        assert_eq!(chain.layers().len(), 3);
    });
    let gate = Gate::new();
    let spec = StackSpec { snapshot: Some("never".into()), ..images.top() };
    assert_eq!(refused(&spec, &gate).kind(), ErrorKind::NotFound);
}

#[test]
fn external_data_files() {
    if !judges::available("qemu-img") {
        return;
    }
    let images = Images::new();
    images.run(&["create", "-q", "-f", "qcow2", "-o", "data_file=sub/data.raw", "ext.qcow2", "4M"]);
    images.io("qcow2", "ext.qcow2", "write -P 5 1M 1M");
    let expected = images.as_qemu_reads("ext.qcow2", "qcow2");
    let spec = images.spec("ext.qcow2", Format::Qcow2);
    executor::run(0, async {
        let gate = Gate::new();
        assert!(contents(open(&spec, &gate).await.unwrap()).await == expected);
        assert_eq!(*gate.asked.borrow(), [(ReferenceKind::DataFile, images.path("sub/data.raw"))]);
        std::fs::rename(images.path("sub/data.raw"), images.path("moved.raw")).unwrap();
        let moved = StackSpec { data_file: Some(images.path("moved.raw")), ..spec.clone() };
        assert!(contents(open(&moved, &Gate::new()).await.unwrap()).await == expected);
    });
    assert_eq!(refused(&spec, &Gate::new()).kind(), ErrorKind::NotFound);
    let surplus = StackSpec { data_file: Some(images.path("moved.raw")), ..images.top() };
    refused_with(&surplus, &Gate::new(), ErrorKind::Invalid, &["top.qcow2", "holds its data itself"]);
}

#[test]
fn what_is_refused_and_why() {
    if !judges::available("qemu-img") {
        return;
    }
    let images = Images::new();
    let gate = Gate { deny: true, ..Gate::new() };
    refused_with(&images.top(), &gate, ErrorKind::Invalid, &["the gate says no"]);
    assert!(!gate.opened.borrow().contains_key(&images.path("mid.qcow2")), "asked before opened");

    // The extension that records the parent's format becomes one that nobody knows.
    let forget_format = Gate {
        change: |_, memory| {
            memory.tamper(|bytes| {
                let mut head = vec![0; 4096];
                bytes.read(0, &mut head);
                if let Some(at) = head.windows(4).position(|w| w == [0xe2, 0x79, 0x2a, 0xca]) {
                    bytes.write(at as u64, &[0x12, 0x34, 0x56, 0x78]);
                }
            });
        },
        ..Gate::new()
    };
    let words = ["top.qcow2", "without its format", "qemu-img rebase -u -b ./mid.qcow2 -F FORMAT"];
    refused_with(&images.top(), &forget_format, ErrorKind::Unsupported, &words);

    for (name, parent, word) in [
        ("json.qcow2", "json:{\"driver\":\"file\",\"filename\":\"/etc/passwd\"}", "json:"),
        ("nbd.qcow2", "nbd://localhost/export", "\"nbd\""),
    ] {
        images.run(&["create", "-q", "-u", "-f", "qcow2", "-b", parent, "-F", "raw", name, "1M"]);
        let spec = images.spec(name, Format::Qcow2);
        refused_with(&spec, &Gate::new(), ErrorKind::Unsupported, &[name, word, "only names of files"]);
    }
    images.run(&["create", "-q", "-u", "-f", "qcow2", "-b", "x.vmdk", "-F", "vmdk", "odd.qcow2", "1M"]);
    let spec = images.spec("odd.qcow2", Format::Qcow2);
    refused_with(&spec, &Gate::new(), ErrorKind::Unsupported, &["vmdk", "expected raw or qcow2"]);
    images.run(&["create", "-q", "-u", "-f", "qcow2", "-b", "gone.raw", "-F", "raw", "gone.qcow2", "1M"]);
    let spec = images.spec("gone.qcow2", Format::Qcow2);
    refused_with(&spec, &Gate::new(), ErrorKind::NotFound, &["gone.raw"]);

    for (name, parent) in [("a.qcow2", "b.qcow2"), ("b.qcow2", "sub/../a.qcow2"), ("self.qcow2", "sub/../self.qcow2")] {
        images.run(&["create", "-q", "-u", "-f", "qcow2", "-b", parent, "-F", "qcow2", name, "1M"]);
    }
    let spec = images.spec("a.qcow2", Format::Qcow2);
    refused_with(&spec, &Gate::new(), ErrorKind::Invalid, &["sub/../a.qcow2", "comes back to this file"]);
    let spec = images.spec("self.qcow2", Format::Qcow2);
    refused_with(&spec, &Gate::new(), ErrorKind::Invalid, &["self.qcow2", "comes back to this file"]);

    for (spec, word) in [
        (StackSpec { snapshot: Some("x".into()), ..images.spec("sub/base.raw", Format::Raw) }, "snapshots"),
        (StackSpec { data_file: Some("x".into()), ..images.spec("sub/base.raw", Format::Raw) }, "data files"),
        (
            StackSpec {
                parent: ParentSpec::Explicit(Box::new(images.top())),
                ..images.spec("sub/base.raw", Format::Raw)
            },
            "parents",
        ),
    ] {
        refused_with(&spec, &Gate::new(), ErrorKind::Invalid, &["base.raw", word]);
    }
}

#[test]
fn a_parent_that_cannot_be_opened_leaves_the_top_untouched() {
    if !judges::available("qemu-img") {
        return;
    }
    let images = Images::new();
    let before = std::fs::read(images.path("top.qcow2")).unwrap();
    let gate = Gate {
        change: |path, memory| {
            if path.ends_with("mid.qcow2") {
                memory.tamper(|bytes| bytes.write(40, &[0xff; 8])); // Where the L1 table begins.
            }
        },
        ..Gate::new()
    };
    let error = refused(&images.top(), &gate);
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    assert!(error.to_string().contains("mid.qcow2"), "{error}");
    let top = gate.memory(&images.path("top.qcow2"));
    assert!(top.counters().writes == 0 && top.to_vec() == before);
}

/// Every file is the same image, whose parent is a file one directory further down.
struct Bottomless(MemoryStorage);

impl OpenGate for Bottomless {
    fn open_storage<'a>(&'a self, _: &'a Path, _: Access) -> LocalFuture<'a, Result<StorageHandle>> {
        Box::pin(async { Ok(self.0.handle()) })
    }
    fn allow(&self, _: &Reference<'_>) -> Result<()> {
        Ok(())
    }
    fn identity(&self, path: &Path) -> PathBuf {
        path.to_owned()
    }
}

#[test]
fn depth_is_bounded() {
    if !judges::available("qemu-img") {
        return;
    }
    let images = Images::new();
    images.run(&["create", "-q", "-u", "-f", "qcow2", "-b", "d/x.qcow2", "-F", "qcow2", "x.qcow2", "1M"]);
    let gate = Bottomless(MemoryStorage::from_file(&images.path("x.qcow2")).unwrap());
    let error = match executor::run(0, open(&StackSpec::new("x.qcow2", Format::Qcow2), &gate)) {
        Ok(_) => panic!("opened a chain without end"),
        Err(error) => error,
    };
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(error.to_string().contains(&format!("more than {MAX_DEPTH} layers")), "{error}");
}

/// As deep as allowed, all of it absent: the recursion's memory is bounded, too.
#[test]
fn the_deepest_chain_reads() {
    if !judges::available("qemu-img") {
        return;
    }
    let images = Images::new();
    images.run(&["create", "-q", "-f", "qcow2", "x.qcow2", "1M"]);
    let memory = MemoryStorage::from_file(&images.path("x.qcow2")).unwrap();
    let mut spec = StackSpec { parent: ParentSpec::None, ..StackSpec::new("0", Format::Qcow2) };
    for depth in 1..MAX_DEPTH {
        spec = StackSpec {
            parent: ParentSpec::Explicit(Box::new(spec)),
            read_only: true,
            ..StackSpec::new(depth.to_string(), Format::Qcow2)
        };
    }
    executor::run(0, async {
        let disk = DiskHandle::new(open(&spec, &Bottomless(memory)).await.unwrap());
        assert!(disk.read(0, Buf::new(1 << 20)).await.unwrap().iter().all(|b| *b == 0));
        let extent = disk.map(ByteRange::new(0, 1 << 20)).await.unwrap();
        assert_eq!((extent.depth, extent.zero, extent.range.len()), (None, true, 1 << 20));
        disk.close().await.unwrap();
    });
}

#[test]
fn sizes_differ_along_the_chain() {
    if !judges::available("qemu-img") {
        return;
    }
    let images = Images::new();
    images.run(&["create", "-q", "-f", "qcow2", "-b", "top.qcow2", "-F", "qcow2", "long.qcow2", "6M"]);
    images.run(&["create", "-q", "-f", "qcow2", "-b", "long.qcow2", "-F", "qcow2", "short.qcow2", "1M"]);
    for (name, size) in [("long.qcow2", SIZE + (2 << 20)), ("short.qcow2", 1 << 20)] {
        let expected = images.as_qemu_reads(name, "qcow2");
        let bytes = executor::run(0, async {
            contents(open(&images.spec(name, Format::Qcow2), &Gate::new()).await.unwrap()).await
        });
        assert!(bytes.len() as u64 == size && bytes == expected, "{name}");
    }
    // A grown child shows zeroes where its parent goes on.
    let gate = Gate::new();
    let short = images.path("short.qcow2");
    executor::run(0, async {
        let disk = DiskHandle::new(open(&images.spec("short.qcow2", Format::Qcow2), &gate).await.unwrap());
        disk.resize(3 << 20).await.unwrap();
        let grown = disk.read(1 << 20, Buf::new(2 << 20)).await.unwrap();
        assert!(grown.iter().all(|b| *b == 0));
        disk.close().await.unwrap();
    });
    gate.memory(&short).write_to(&short).unwrap();
    judges::check(&short, "qcow2").assert_clean();
    let seen = images.as_qemu_reads("short.qcow2", "qcow2");
    assert!(seen.len() == 3 << 20 && seen[1 << 20..].iter().all(|b| *b == 0) && seen[0] == 1);
}
