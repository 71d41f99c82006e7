//! The handshake, byte by byte.

use super::*;
use crate::context;

/// What the client sees of one reply to an option.
#[derive(Debug, PartialEq, Eq)]
struct Reply {
    option: u32,
    kind: u32,
    data: Vec<u8>,
}

/// A client with a server that has the exports "disk" (writable) and "frozen" (read-only).
struct Dialogue {
    negotiation: Negotiation,
    agreement: Option<Agreement>,
    closed: Option<&'static str>,
    wants_tls: bool,
    output: Vec<u8>,
}

fn facts(name: &str, read_only: bool) -> ExportFacts {
    ExportFacts {
        name: name.into(),
        description: format!("the {name}"),
        size: 1 << 30,
        read_only,
        preferred_alignment: 65536,
        contexts: Some(Collected { contexts: context::standard(), left_out: 0 }),
    }
}

impl Dialogue {
    fn greeted(mode: TlsMode) -> Self {
        let mut dialogue = Self {
            negotiation: Negotiation::new(mode),
            agreement: None,
            closed: None,
            wants_tls: false,
            output: Vec::new(),
        };
        dialogue.run();
        assert_eq!(dialogue.output, b"NBDMAGICIHAVEOPT\x00\x03");
        dialogue.output.clear();
        dialogue
    }

    fn new(mode: TlsMode) -> Self {
        let mut dialogue = Self::greeted(mode);
        dialogue.send(&[0, 0, 0, 3]);
        dialogue
    }

    fn run(&mut self) {
        loop {
            let step = self.negotiation.advance();
            self.output.extend(self.negotiation.take_output());
            let step = match step {
                Step::List => {
                    self.negotiation.list([("disk", "the disk"), ("frozen", "")]);
                    None
                }
                Step::Lookup { name, .. } => self.negotiation.found(match name.as_str() {
                    "" | "disk" => Some(facts("disk", false)),
                    "frozen" => Some(facts("frozen", true)),
                    _ => None,
                }),
                step => Some(step),
            };
            self.output.extend(self.negotiation.take_output());
            match step {
                None => {}
                Some(Step::Receive) => return,
                Some(Step::StartTls) => {
                    self.wants_tls = true;
                    return;
                }
                Some(Step::Transmit(agreement)) => {
                    self.agreement = Some(agreement);
                    return;
                }
                Some(Step::Close(reason)) => {
                    self.closed = Some(reason);
                    return;
                }
                Some(Step::List | Step::Lookup { .. }) => panic!("answered above"),
            }
        }
    }

    fn send(&mut self, bytes: &[u8]) {
        self.negotiation.receive(bytes);
        self.run();
    }

    fn option(&mut self, option: u32, data: &[u8]) -> Vec<Reply> {
        self.send(&option_bytes(option, data));
        self.replies()
    }

    /// The kinds of the replies.
    fn kinds(&mut self, option: u32, data: &[u8]) -> Vec<u32> {
        let replies = self.option(option, data);
        assert!(replies.iter().all(|reply| reply.option == option));
        replies.iter().map(|reply| reply.kind).collect()
    }

    fn replies(&mut self) -> Vec<Reply> {
        let output = std::mem::take(&mut self.output);
        let mut cursor = Cursor(&output);
        let mut replies = Vec::new();
        while let Some(magic) = cursor.u64() {
            assert_eq!(magic, 0x0003_e889_0455_65a9);
            let option = cursor.u32().unwrap();
            let kind = cursor.u32().unwrap();
            let len = cursor.u32().unwrap();
            replies.push(Reply { option, kind, data: cursor.bytes(len as usize).unwrap().to_vec() });
        }
        assert!(cursor.is_empty());
        replies
    }
}

fn option_bytes(option: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = b"IHAVEOPT".to_vec();
    bytes.extend_from_slice(&option.to_be_bytes());
    bytes.extend_from_slice(&u32::try_from(data.len()).unwrap().to_be_bytes());
    bytes.extend_from_slice(data);
    bytes
}

fn info_data(name: &str, wanted: &[u16]) -> Vec<u8> {
    let mut data = u32::try_from(name.len()).unwrap().to_be_bytes().to_vec();
    data.extend_from_slice(name.as_bytes());
    data.extend_from_slice(&u16::try_from(wanted.len()).unwrap().to_be_bytes());
    wanted.iter().for_each(|kind| data.extend_from_slice(&kind.to_be_bytes()));
    data
}

fn meta_data(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = u32::try_from(name.len()).unwrap().to_be_bytes().to_vec();
    data.extend_from_slice(name.as_bytes());
    data.extend_from_slice(&u32::try_from(queries.len()).unwrap().to_be_bytes());
    for query in queries {
        data.extend_from_slice(&u32::try_from(query.len()).unwrap().to_be_bytes());
        data.extend_from_slice(query.as_bytes());
    }
    data
}

#[test]
fn client_flags() {
    let mut d = Dialogue::greeted(TlsMode::Off);
    d.send(&[0, 0, 0, 4]);
    assert_eq!(d.closed, Some("unknown client flags"));
    let mut d = Dialogue::greeted(TlsMode::Off);
    d.send(&[0, 0, 0]);
    assert!(d.closed.is_none());
    d.send(&[3]);
    assert_eq!(d.kinds(option::LIST, &[]), [reply::SERVER, reply::SERVER, reply::ACK]);
}

#[test]
fn without_fixed_newstyle_only_a_name_is_taken() {
    let mut d = Dialogue::greeted(TlsMode::Off);
    d.send(&[0, 0, 0, 0]);
    d.send(&option_bytes(option::EXPORT_NAME, b"disk"));
    assert_eq!(d.output.len(), 8 + 2 + 124, "zeroes were not declined");
    assert_eq!(d.agreement.unwrap().style, ReplyStyle::Simple);
    let mut d = Dialogue::greeted(TlsMode::Off);
    d.send(&[0, 0, 0, 0]);
    d.send(&option_bytes(option::LIST, &[]));
    assert!(d.closed.is_some());
}

#[test]
fn export_name() {
    let mut d = Dialogue::new(TlsMode::Off);
    d.send(&option_bytes(option::EXPORT_NAME, b"frozen"));
    let mut cursor = Cursor(&d.output);
    assert_eq!(cursor.u64(), Some(1 << 30));
    assert_eq!(cursor.u16(), Some(0b101_0000_1111), "flags, read-only, flush, FUA, multi-conn, cache");
    assert!(cursor.is_empty());
    assert!(d.agreement.unwrap().read_only);

    let mut d = Dialogue::new(TlsMode::Off);
    d.send(&option_bytes(option::EXPORT_NAME, b"nothing"));
    assert_eq!((d.closed, d.output.len()), (Some("export does not exist"), 0));
    let mut d = Dialogue::new(TlsMode::Off);
    d.send(&option_bytes(option::EXPORT_NAME, &[b'n'; 4097]));
    assert!(d.closed.is_some());
    let mut d = Dialogue::new(TlsMode::Off);
    assert_eq!(d.kinds(option::EXTENDED_HEADERS, &[]), [reply::ACK]);
    d.send(&option_bytes(option::EXPORT_NAME, b"disk"));
    assert!(d.closed.is_some());
}

#[test]
fn list() {
    let mut d = Dialogue::new(TlsMode::Off);
    let replies = d.option(option::LIST, &[]);
    assert_eq!(replies[0].data, b"\0\0\0\x04diskthe disk");
    assert_eq!(replies[1].data, b"\0\0\0\x06frozen");
    assert_eq!(d.kinds(option::LIST, b"x"), [reply::ERR_INVALID]);
}

#[test]
fn abort_is_acknowledged() {
    for mode in [TlsMode::Off, TlsMode::Required] {
        let mut d = Dialogue::new(mode);
        assert_eq!(d.kinds(option::ABORT, b"whatever"), [reply::ACK]);
        assert!(d.closed.is_some());
    }
}

#[test]
fn unknown_options_are_unsupported_and_skipped() {
    let mut d = Dialogue::new(TlsMode::Off);
    for unknown in [0, 4, 12, 77, u32::MAX] {
        assert_eq!(d.kinds(unknown, &[9; 100]), [reply::ERR_UNSUP]);
    }
    assert_eq!(d.kinds(option::LIST, &[]).len(), 3);
}

#[test]
fn info_then_go() {
    let mut d = Dialogue::new(TlsMode::Off);
    let wanted = [info::NAME, info::DESCRIPTION, info::BLOCK_SIZE, 99];
    let replies = d.option(option::INFO, &info_data("", &wanted));
    assert_eq!(replies.len(), 5);
    assert_eq!(replies[0].data[..2], [0, 0]);
    assert_eq!(replies[0].data[2..10], (1u64 << 30).to_be_bytes());
    assert_eq!(replies[1].data, b"\0\x01disk");
    assert_eq!(replies[2].data, b"\0\x02the disk");
    assert_eq!(replies[3].data, [0, 3, 0, 0, 0, 1, 0, 1, 0, 0, 2, 0, 0, 0]);
    assert_eq!(replies[4].kind, reply::ACK);
    assert!(d.agreement.is_none());
    assert_eq!(d.kinds(option::INFO, &info_data("nothing", &[])), [reply::ERR_UNKNOWN]);
    assert_eq!(d.kinds(option::GO, &info_data("nothing", &[])), [reply::ERR_UNKNOWN]);
    assert_eq!(d.kinds(option::GO, &[0, 0, 0, 9, 1]), [reply::ERR_INVALID]);
    assert_eq!(d.kinds(option::GO, &info_data("disk", &[])), [reply::INFO, reply::ACK]);
    assert_eq!(d.agreement.unwrap().export, "disk");
}

#[test]
fn flags_follow_what_was_negotiated() {
    let flags = |options: &[u32], export: &str| {
        let mut d = Dialogue::new(TlsMode::Off);
        for option in options {
            assert_eq!(d.kinds(*option, &[]), [reply::ACK]);
        }
        let replies = d.option(option::INFO, &info_data(export, &[]));
        u16::from_be_bytes(replies[0].data[10..].try_into().unwrap())
    };
    use transmission as t;
    let plain = flags(&[], "disk");
    assert_eq!(plain & t::READ_ONLY, 0);
    assert_ne!(plain & t::SEND_TRIM, 0);
    assert_eq!(plain & (t::SEND_DF | t::BLOCK_STATUS_PAYLOAD), 0);
    assert_eq!(flags(&[option::STRUCTURED_REPLY], "disk"), plain | t::SEND_DF);
    assert_eq!(flags(&[option::EXTENDED_HEADERS], "disk"), plain | t::SEND_DF | t::BLOCK_STATUS_PAYLOAD);
    let frozen = flags(&[], "frozen");
    assert_eq!(frozen & (t::READ_ONLY | t::SEND_TRIM | t::SEND_WRITE_ZEROES | t::SEND_FAST_ZERO), t::READ_ONLY);
}

#[test]
fn structured_and_extended() {
    let mut d = Dialogue::new(TlsMode::Off);
    assert_eq!(d.kinds(option::STRUCTURED_REPLY, b"x"), [reply::ERR_INVALID]);
    assert_eq!(d.kinds(option::STRUCTURED_REPLY, &[]), [reply::ACK]);
    assert_eq!(d.kinds(option::STRUCTURED_REPLY, &[]), [reply::ERR_INVALID]);
    assert_eq!(d.kinds(option::EXTENDED_HEADERS, b"x"), [reply::ERR_INVALID]);
    assert_eq!(d.kinds(option::EXTENDED_HEADERS, &[]), [reply::ACK]);
    assert_eq!(d.kinds(option::EXTENDED_HEADERS, &[]), [reply::ERR_INVALID]);
    assert_eq!(d.kinds(option::STRUCTURED_REPLY, &[]), [reply::ERR_EXT_HEADER_REQD]);
    d.option(option::GO, &info_data("disk", &[]));
    assert_eq!(d.agreement.unwrap().style, ReplyStyle::Extended);
}

#[test]
fn metadata_contexts() {
    let mut d = Dialogue::new(TlsMode::Off);
    let set = meta_data("disk", &["base:allocation"]);
    assert_eq!(d.kinds(option::SET_META_CONTEXT, &set), [reply::ERR_INVALID], "structured replies come first");
    assert_eq!(d.kinds(option::STRUCTURED_REPLY, &[]), [reply::ACK]);
    let names = |replies: Vec<Reply>| -> Vec<String> {
        let (ack, contexts) = replies.split_last().unwrap();
        assert_eq!(ack.kind, reply::ACK);
        contexts.iter().map(|reply| String::from_utf8(reply.data[4..].to_vec()).unwrap()).collect()
    };
    let mut list = |queries: &[&str]| names(d.option(option::LIST_META_CONTEXT, &meta_data("disk", queries)));
    assert_eq!(list(&[]), ["base:allocation", "qemu:allocation-depth"]);
    assert_eq!(list(&["base:"]), ["base:allocation"]);
    assert_eq!(list(&["qemu:"]), ["qemu:allocation-depth"]);
    assert!(list(&["x-other:", "base:other"]).is_empty());
    assert_eq!(d.kinds(option::LIST_META_CONTEXT, &meta_data("no", &[])), [reply::ERR_UNKNOWN]);
    let many = vec!["base:"; 257];
    assert_eq!(d.kinds(option::LIST_META_CONTEXT, &meta_data("disk", &many)), [reply::ERR_TOO_BIG]);
    assert!(names(d.option(option::SET_META_CONTEXT, &meta_data("disk", &["base:", "x:y"]))).is_empty());
    let replies = d.option(option::SET_META_CONTEXT, &meta_data("disk", &["qemu:allocation-depth", "base:allocation"]));
    assert_eq!(replies[0].data[..4], [0, 0, 0, 0]);
    assert_eq!(replies[1].data[..4], [0, 0, 0, 1]);
    d.option(option::GO, &info_data("disk", &[]));
    let selected: Vec<_> = d.agreement.as_ref().unwrap().contexts.iter().map(|c| c.name()).collect();
    assert_eq!(selected, ["base:allocation", "qemu:allocation-depth"]);
}

#[test]
fn contexts_are_of_one_export_and_of_the_last_selection() {
    let set = |d: &mut Dialogue, name, queries: &[&str]| d.kinds(option::SET_META_CONTEXT, &meta_data(name, queries));
    let mut d = Dialogue::new(TlsMode::Off);
    d.option(option::STRUCTURED_REPLY, &[]);
    set(&mut d, "frozen", &["base:allocation"]);
    d.option(option::GO, &info_data("disk", &[]));
    assert!(d.agreement.unwrap().contexts.is_empty());

    let mut d = Dialogue::new(TlsMode::Off);
    d.option(option::STRUCTURED_REPLY, &[]);
    set(&mut d, "disk", &["base:allocation"]);
    assert_eq!(d.kinds(option::SET_META_CONTEXT, &[1]), [reply::ERR_INVALID]);
    d.option(option::GO, &info_data("disk", &[]));
    assert!(d.agreement.unwrap().contexts.is_empty(), "a failed selection clears the former one");
}

#[test]
fn without_tls() {
    let mut d = Dialogue::new(TlsMode::Off);
    assert_eq!(d.kinds(option::STARTTLS, &[]), [reply::ERR_POLICY]);
    assert_eq!(d.kinds(option::GO, &info_data("disk", &[])), [reply::INFO, reply::ACK]);
}

#[test]
fn required_tls_comes_first() {
    let mut d = Dialogue::new(TlsMode::Required);
    for option in [option::LIST, option::INFO, option::GO, option::STRUCTURED_REPLY, option::EXTENDED_HEADERS, 99] {
        assert_eq!(d.kinds(option, &[]), [reply::ERR_TLS_REQD]);
    }
    assert_eq!(d.kinds(option::STARTTLS, b"x"), [reply::ERR_INVALID]);
    assert_eq!(d.kinds(option::LIST, &vec![0; 70_000]), [reply::ERR_TLS_REQD]);
    assert_eq!(d.kinds(option::STARTTLS, &[]), [reply::ACK]);
    assert!(d.wants_tls);
    d.negotiation.tls_started();
    assert_eq!(d.kinds(option::STARTTLS, &[]), [reply::ERR_INVALID]);
    assert_eq!(d.kinds(option::LIST, &[]).len(), 3);

    let mut d = Dialogue::new(TlsMode::Required);
    d.send(&option_bytes(option::EXPORT_NAME, b"disk"));
    assert!(d.closed.is_some() && d.output.is_empty());
}

#[test]
fn tls_forgets_what_came_before() {
    let mut d = Dialogue::new(TlsMode::Optional);
    d.option(option::EXTENDED_HEADERS, &[]);
    d.option(option::SET_META_CONTEXT, &meta_data("disk", &["base:allocation"]));
    let mut injected = option_bytes(option::STARTTLS, &[]);
    injected.extend(option_bytes(option::GO, &info_data("disk", &[])));
    d.send(&injected);
    assert_eq!(d.replies().len(), 1, "only STARTTLS is answered");
    assert!(d.wants_tls && d.agreement.is_none());
    d.negotiation.tls_started();
    d.run();
    assert!(d.agreement.is_none(), "what was sent in plain text is gone");
    d.option(option::GO, &info_data("disk", &[]));
    let agreement = d.agreement.unwrap();
    assert_eq!((agreement.style, agreement.contexts.len()), (ReplyStyle::Simple, 0));
}

#[test]
fn long_options_are_skipped_or_end_the_connection() {
    let mut d = Dialogue::new(TlsMode::Off);
    assert_eq!(d.kinds(option::LIST, &vec![0; 65537]), [reply::ERR_TOO_BIG]);
    assert_eq!(d.kinds(option::LIST, &[]).len(), 3, "the connection survives");
    let mut endless = b"IHAVEOPT\0\0\0\x03".to_vec();
    endless.extend_from_slice(&u32::MAX.to_be_bytes());
    d.send(&endless);
    assert!(d.closed.is_some());
}

#[test]
fn too_many_options_end_the_connection() {
    let mut d = Dialogue::new(TlsMode::Off);
    let mut sent = 0;
    while d.closed.is_none() {
        d.option(99, &[]);
        sent += 1;
        assert!(sent <= MAX_OPTIONS + 1);
    }
    assert_eq!(sent, MAX_OPTIONS + 1);
}

#[test]
fn wrong_magic_ends_the_connection() {
    let mut d = Dialogue::new(TlsMode::Off);
    d.send(b"GET / HTTP/1.1\r\n\r\n");
    assert!(d.closed.is_some());
}

#[test]
fn bytes_behind_the_agreement_are_kept() {
    let mut d = Dialogue::new(TlsMode::Off);
    let mut bytes = option_bytes(option::GO, &info_data("disk", &[]));
    bytes.extend_from_slice(b"request");
    d.send(&bytes);
    assert!(d.agreement.is_some());
    assert_eq!(d.negotiation.into_input(), b"request");
}

#[test]
fn split_anywhere() {
    let mut bytes = vec![0, 0, 0, 3];
    bytes.extend(option_bytes(option::STRUCTURED_REPLY, &[]));
    bytes.extend(option_bytes(99, &[1; 40]));
    bytes.extend(option_bytes(option::GO, &info_data("disk", &[3])));
    let mut whole = Dialogue::greeted(TlsMode::Off);
    whole.send(&bytes);
    let mut split = Dialogue::greeted(TlsMode::Off);
    bytes.iter().for_each(|byte| split.send(&[*byte]));
    assert_eq!(whole.output, split.output);
    assert!(whole.agreement.is_some() && split.agreement.is_some());
}

#[test]
fn shutdown_refuses_politely() {
    let mut d = Dialogue::new(TlsMode::Off);
    d.negotiation.shut_down();
    assert_eq!(d.kinds(option::GO, &info_data("disk", &[])), [reply::ERR_SHUTDOWN]);
    assert_eq!(d.kinds(option::ABORT, &[]), [reply::ACK]);
}
