//! The handshake as a state machine without I/O: bytes in, replies and questions out.
//!
//! [`Negotiation::advance`] says what comes next; whatever it says, [`Negotiation::take_output`] is sent
//! first. The machine knows no exports: it asks ([`Step::Lookup`], [`Step::List`]), because the facts
//! about an export are on the thread of its disk.

use crate::context::{Collected, MAX_SELECTED, MetaContext, listed_by};
use crate::options::{BadOption, InfoRequest, MetaRequest, push_reply, string};
use crate::wire::{
    Cursor, INIT_MAGIC, MAX_PAYLOAD, MAX_STRING, MIN_PREFERRED_BLOCK, OPTION_MAGIC, ReplyStyle, handshake, info,
    option, reply, transmission,
};
use std::collections::HashSet;
use std::sync::Arc;

/// Largest data of one option that is looked at; more is skipped and answered with
/// `NBD_REP_ERR_TOO_BIG`.
const MAX_OPTION_DATA: u32 = 64 << 10;
/// Largest data of one option that is skipped; more ends the connection.
const MAX_SKIPPED_DATA: u32 = 16 << 20;
/// Options per connection; more end it.
const MAX_OPTIONS: u32 = 4096;

/// Whether connections are encrypted (proto.md, "TLS support").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TlsMode {
    /// `NBD_OPT_STARTTLS` is refused (NOTLS).
    Off,
    /// At the client's choice (SELECTIVETLS, no export insists).
    Optional,
    /// Nothing before it (FORCEDTLS).
    Required,
}

/// What a client may learn about an export.
#[derive(Clone)]
pub(crate) struct ExportFacts {
    /// Canonical name.
    pub(crate) name: String,
    /// For people; may be empty.
    pub(crate) description: String,
    /// Bytes.
    pub(crate) size: u64,
    pub(crate) read_only: bool,
    /// Bytes; a power of two.
    pub(crate) preferred_alignment: u32,
    /// When they were asked for.
    pub(crate) contexts: Option<Collected>,
}

impl ExportFacts {
    /// Only what the server really does is advertised. A flush covers all completed writes of the disk,
    /// from whichever connection, hence `CAN_MULTI_CONN`.
    fn transmission_flags(&self, style: ReplyStyle) -> u16 {
        use transmission as t;
        let mut flags = t::HAS_FLAGS | t::SEND_FLUSH | t::SEND_FUA | t::CAN_MULTI_CONN | t::SEND_CACHE;
        if self.read_only {
            flags |= t::READ_ONLY;
        } else {
            flags |= t::SEND_TRIM | t::SEND_WRITE_ZEROES | t::SEND_FAST_ZERO;
        }
        if style.is_chunked() {
            flags |= t::SEND_DF;
        }
        if style == ReplyStyle::Extended {
            flags |= t::BLOCK_STATUS_PAYLOAD;
        }
        flags
    }

    fn preferred_block(&self) -> u32 {
        let wanted = self.preferred_alignment.checked_next_power_of_two().unwrap_or(MAX_PAYLOAD);
        wanted.clamp(MIN_PREFERRED_BLOCK, MAX_PAYLOAD)
    }
}

/// What both sides agreed on when transmission begins.
#[derive(Clone)]
pub(crate) struct Agreement {
    /// The export's canonical name.
    pub(crate) export: String,
    pub(crate) style: ReplyStyle,
    /// Whether writes are refused.
    pub(crate) read_only: bool,
    /// Selected metadata contexts, at most [`MAX_SELECTED`]; the position is the identifier on the wire.
    pub(crate) contexts: Vec<Arc<dyn MetaContext>>,
}

/// What the negotiation needs next.
pub(crate) enum Step {
    /// More bytes from the client.
    Receive,
    /// [`Negotiation::list`] with the names and descriptions of all exports.
    List,
    /// [`Negotiation::found`] with the export of that name, if there is one.
    Lookup {
        name: String,
        /// Whether its contexts are wanted as well; there may be thousands.
        with_contexts: bool,
    },
    /// The TLS handshake, then [`Negotiation::tls_started`].
    StartTls,
    /// Nothing: transmission begins. Received bytes that remain are [`Negotiation::into_input`].
    Transmit(Agreement),
    /// The end of the connection; the reason is for the log.
    Close(&'static str),
}

/// Where in the dialogue we are.
enum State {
    /// Waiting for the client's flags.
    ClientFlags,
    /// Waiting for an option.
    Option,
    /// Dropping the data of an option that was too long.
    Skip { option: u32, remaining: u32 },
    /// Waiting for [`Negotiation::list`].
    List,
    /// Waiting for [`Negotiation::found`].
    Lookup(Pending),
    /// Waiting for [`Negotiation::tls_started`].
    StartTls,
    /// The agreement was handed out, or the connection is to end.
    Finished,
}

/// The option that waits for an export's facts.
enum Pending {
    ExportName,
    Info { option: u32, request: InfoRequest },
    ListContexts(MetaRequest),
    SetContexts(MetaRequest),
}

/// One handshake.
pub(crate) struct Negotiation {
    mode: TlsMode,
    encrypted: bool,
    shutting_down: bool,
    fixed_newstyle: bool,
    no_zeroes: bool,
    style: ReplyStyle,
    /// What the last `NBD_OPT_SET_META_CONTEXT` selected, and for which export.
    selected: Option<(String, Vec<Arc<dyn MetaContext>>)>,
    options: u32,
    state: State,
    input: Vec<u8>,
    /// Bytes of `input` that are done with.
    consumed: usize,
    output: Vec<u8>,
}

impl Negotiation {
    /// Begins with the server's greeting in the output.
    pub(crate) fn new(mode: TlsMode) -> Self {
        let mut output = Vec::with_capacity(512);
        output.extend_from_slice(&INIT_MAGIC.to_be_bytes());
        output.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
        output.extend_from_slice(&(handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES).to_be_bytes());
        Self {
            mode,
            encrypted: false,
            shutting_down: false,
            fixed_newstyle: false,
            no_zeroes: false,
            style: ReplyStyle::Simple,
            selected: None,
            options: 0,
            state: State::ClientFlags,
            input: Vec::new(),
            consumed: 0,
            output,
        }
    }

    /// Takes bytes from the client. They are bounded by the caller, who calls this only after
    /// [`Step::Receive`].
    pub(crate) fn receive(&mut self, bytes: &[u8]) {
        self.input.drain(..self.consumed);
        self.consumed = 0;
        self.input.extend_from_slice(bytes);
    }

    /// What is to be sent before anything else happens.
    pub(crate) fn take_output(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.output)
    }

    /// From now on options are answered with `NBD_REP_ERR_SHUTDOWN`.
    pub(crate) fn shut_down(&mut self) {
        self.shutting_down = true;
    }

    /// Received bytes that the negotiation did not use: requests sent behind the last option.
    pub(crate) fn into_input(mut self) -> Vec<u8> {
        self.input.drain(..self.consumed);
        self.input
    }

    /// Works through the received bytes until something is needed.
    pub(crate) fn advance(&mut self) -> Step {
        loop {
            let step = match self.state {
                State::ClientFlags => self.client_flags(),
                State::Option => self.option(),
                State::Skip { option, remaining } => self.skip(option, remaining),
                State::List => Some(Step::List),
                State::Lookup(_) => unreachable!("the caller answers a lookup before it goes on"),
                State::StartTls => Some(Step::StartTls),
                State::Finished => Some(Step::Close("negotiation is over")),
            };
            if let Some(step) = step {
                return step;
            }
        }
    }

    fn close(&mut self, reason: &'static str) -> Option<Step> {
        self.state = State::Finished;
        Some(Step::Close(reason))
    }

    fn client_flags(&mut self) -> Option<Step> {
        let Some(flags) = Cursor(&self.input[self.consumed..]).u32() else {
            return Some(Step::Receive);
        };
        self.consumed += 4;
        let known = u32::from(handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES);
        if flags & !known != 0 {
            return self.close("unknown client flags");
        }
        self.fixed_newstyle = flags & u32::from(handshake::FIXED_NEWSTYLE) != 0;
        self.no_zeroes = flags & u32::from(handshake::NO_ZEROES) != 0;
        self.state = State::Option;
        None
    }

    fn option(&mut self) -> Option<Step> {
        let mut cursor = Cursor(&self.input[self.consumed..]);
        let Some(magic) = cursor.u64() else {
            return Some(Step::Receive);
        };
        if magic != OPTION_MAGIC {
            return self.close("wrong magic in front of an option");
        }
        let (Some(option), Some(len)) = (cursor.u32(), cursor.u32()) else {
            return Some(Step::Receive);
        };
        if !self.fixed_newstyle && option != option::EXPORT_NAME {
            return self.close("option other than NBD_OPT_EXPORT_NAME without fixed newstyle");
        }
        if len > MAX_OPTION_DATA {
            self.options += 1;
            self.consumed += 16;
            if option == option::EXPORT_NAME {
                return self.close("export name is longer than 4096 bytes");
            }
            if len > MAX_SKIPPED_DATA {
                return self.close("option data is longer than 16 MiB");
            }
            self.state = State::Skip { option, remaining: len };
            return None;
        }
        // At most 64 KiB, as checked above.
        let data = match cursor.bytes(len as usize) {
            Some(data) => data.to_vec(),
            None => return Some(Step::Receive),
        };
        self.consumed += 16 + data.len();
        self.options += 1;
        if self.options > MAX_OPTIONS {
            return self.close("too many options");
        }
        self.handle(option, &data)
    }

    fn skip(&mut self, option: u32, remaining: u32) -> Option<Step> {
        let here = (self.input.len() - self.consumed).min(remaining as usize);
        self.consumed += here;
        let remaining = remaining - u32::try_from(here).expect("at most `remaining`");
        if remaining > 0 {
            self.state = State::Skip { option, remaining };
            return Some(Step::Receive);
        }
        self.state = State::Option;
        if self.mode == TlsMode::Required && !self.encrypted {
            self.fail(option, reply::ERR_TLS_REQD, "TLS is required")
        } else {
            self.fail(option, reply::ERR_TOO_BIG, "option data is longer than 64 KiB")
        }
    }

    fn ack(&mut self, option: u32) -> Option<Step> {
        push_reply(&mut self.output, option, reply::ACK, &[]);
        None
    }

    fn fail(&mut self, option: u32, error: u32, text: &str) -> Option<Step> {
        push_reply(&mut self.output, option, error, &[text.as_bytes()]);
        None
    }

    fn refuse(&mut self, option: u32, bad: BadOption) -> Option<Step> {
        match bad {
            BadOption::Malformed(text) => self.fail(option, reply::ERR_INVALID, text),
            BadOption::TooBig(text) => self.fail(option, reply::ERR_TOO_BIG, text),
        }
    }

    fn lookup(&mut self, name: &str, pending: Pending) -> Option<Step> {
        let with_contexts = matches!(pending, Pending::ListContexts(_) | Pending::SetContexts(_));
        self.state = State::Lookup(pending);
        Some(Step::Lookup { name: name.to_owned(), with_contexts })
    }

    /// Deals with one whole option. The state is `Option`, and stays so unless said otherwise.
    fn handle(&mut self, option: u32, data: &[u8]) -> Option<Step> {
        if option == option::ABORT {
            self.ack(option);
            return self.close("client aborted");
        }
        if self.mode == TlsMode::Required && !self.encrypted && option != option::STARTTLS {
            if option == option::EXPORT_NAME {
                return self.close("client wants an export without the required TLS");
            }
            return self.fail(option, reply::ERR_TLS_REQD, "TLS is required");
        }
        if self.shutting_down {
            if option == option::EXPORT_NAME {
                return self.close("server is shutting down");
            }
            return self.fail(option, reply::ERR_SHUTDOWN, "server is shutting down");
        }
        match option {
            option::EXPORT_NAME => self.export_name(data),
            option::LIST if !data.is_empty() => self.fail(option, reply::ERR_INVALID, "NBD_OPT_LIST takes no data"),
            option::LIST => {
                self.state = State::List;
                None
            }
            option::STARTTLS => self.start_tls(data),
            option::INFO | option::GO => match InfoRequest::parse(data) {
                Ok(request) => self.lookup(&request.name.clone(), Pending::Info { option, request }),
                Err(bad) => self.refuse(option, bad),
            },
            option::STRUCTURED_REPLY => self.structured_reply(data),
            option::EXTENDED_HEADERS => self.extended_headers(data),
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.meta_context(option, data),
            _ => self.fail(option, reply::ERR_UNSUP, "option is not known"),
        }
    }

    fn export_name(&mut self, data: &[u8]) -> Option<Step> {
        if self.style == ReplyStyle::Extended {
            return self.close("NBD_OPT_EXPORT_NAME after extended headers");
        }
        match string(data) {
            Ok(name) => self.lookup(&name, Pending::ExportName),
            Err(_) => self.close("export name is malformed"),
        }
    }

    fn start_tls(&mut self, data: &[u8]) -> Option<Step> {
        if !data.is_empty() {
            return self.fail(option::STARTTLS, reply::ERR_INVALID, "NBD_OPT_STARTTLS takes no data");
        }
        if self.encrypted {
            return self.fail(option::STARTTLS, reply::ERR_INVALID, "TLS is in use already");
        }
        if self.mode == TlsMode::Off {
            return self.fail(option::STARTTLS, reply::ERR_POLICY, "TLS is not configured");
        }
        self.ack(option::STARTTLS);
        // Whatever came in plain text behind the option may be somebody else's: an attacker's options must
        // not be taken for those of the client that TLS authenticates.
        self.input.clear();
        self.consumed = 0;
        self.state = State::StartTls;
        None
    }

    /// The TLS handshake succeeded. Nothing negotiated before it counts.
    pub(crate) fn tls_started(&mut self) {
        debug_assert!(matches!(self.state, State::StartTls));
        self.encrypted = true;
        self.style = ReplyStyle::Simple;
        self.selected = None;
        self.input.clear();
        self.consumed = 0;
        self.state = State::Option;
    }

    fn structured_reply(&mut self, data: &[u8]) -> Option<Step> {
        let option = option::STRUCTURED_REPLY;
        if !data.is_empty() {
            return self.fail(option, reply::ERR_INVALID, "NBD_OPT_STRUCTURED_REPLY takes no data");
        }
        match self.style {
            ReplyStyle::Simple => {
                self.style = ReplyStyle::Structured;
                self.ack(option)
            }
            ReplyStyle::Structured => self.fail(option, reply::ERR_INVALID, "structured replies are in use already"),
            ReplyStyle::Extended => {
                self.fail(option, reply::ERR_EXT_HEADER_REQD, "extended headers are in use already")
            }
        }
    }

    fn extended_headers(&mut self, data: &[u8]) -> Option<Step> {
        let option = option::EXTENDED_HEADERS;
        if !data.is_empty() {
            return self.fail(option, reply::ERR_INVALID, "NBD_OPT_EXTENDED_HEADERS takes no data");
        }
        if self.style == ReplyStyle::Extended {
            return self.fail(option, reply::ERR_INVALID, "extended headers are in use already");
        }
        self.style = ReplyStyle::Extended;
        self.ack(option)
    }

    fn meta_context(&mut self, option: u32, data: &[u8]) -> Option<Step> {
        if option == option::SET_META_CONTEXT {
            self.selected = None; // Also when this option fails.
        }
        if !self.style.is_chunked() {
            return self.fail(option, reply::ERR_INVALID, "structured replies or extended headers come first");
        }
        let request = match MetaRequest::parse(data) {
            Ok(request) => request,
            Err(bad) => return self.refuse(option, bad),
        };
        let name = request.name.clone();
        self.lookup(
            &name,
            match option {
                option::LIST_META_CONTEXT => Pending::ListContexts(request),
                _ => Pending::SetContexts(request),
            },
        )
    }

    /// Answers [`Step::List`] with names and descriptions.
    pub(crate) fn list<'a>(&mut self, exports: impl IntoIterator<Item = (&'a str, &'a str)>) {
        debug_assert!(matches!(self.state, State::List));
        for (name, description) in exports {
            // Names are bounded by who adds exports; descriptions are cut like every string.
            let len = u32::try_from(name.len()).unwrap_or(0).to_be_bytes();
            let parts = [&len[..], name.as_bytes(), prefix(description).as_bytes()];
            push_reply(&mut self.output, option::LIST, reply::SERVER, &parts);
        }
        self.ack(option::LIST);
        self.state = State::Option;
    }

    /// Answers [`Step::Lookup`]. Returns what is to happen next when that is not up to
    /// [`Negotiation::advance`].
    pub(crate) fn found(&mut self, facts: Option<ExportFacts>) -> Option<Step> {
        let State::Lookup(pending) = std::mem::replace(&mut self.state, State::Option) else {
            unreachable!("called in answer to a lookup");
        };
        let Some(facts) = facts else {
            return match pending {
                Pending::ExportName => self.close("export does not exist"),
                Pending::Info { option, .. } => self.unknown(option),
                Pending::ListContexts(_) => self.unknown(option::LIST_META_CONTEXT),
                Pending::SetContexts(_) => self.unknown(option::SET_META_CONTEXT),
            };
        };
        match pending {
            Pending::ExportName => {
                self.output.extend_from_slice(&facts.size.to_be_bytes());
                self.output.extend_from_slice(&facts.transmission_flags(self.style).to_be_bytes());
                if !self.no_zeroes {
                    self.output.extend_from_slice(&[0; 124]);
                }
                Some(self.agree(facts))
            }
            Pending::Info { option, request } => {
                self.describe(option, &request, &facts);
                self.ack(option);
                (option == option::GO).then(|| self.agree(facts))
            }
            Pending::ListContexts(request) => {
                let all = request.queries.is_empty();
                for context in facts.contexts.iter().flat_map(|collected| &collected.contexts) {
                    let name = context.name();
                    if all || request.queries.iter().any(|query| listed_by(name, query)) {
                        let parts = [&[0; 4][..], name.as_bytes()];
                        push_reply(&mut self.output, option::LIST_META_CONTEXT, reply::META_CONTEXT, &parts);
                    }
                }
                self.ack(option::LIST_META_CONTEXT)
            }
            Pending::SetContexts(request) => self.set_contexts(&request, facts),
        }
    }

    fn unknown(&mut self, option: u32) -> Option<Step> {
        self.fail(option, reply::ERR_UNKNOWN, "export does not exist")
    }

    /// The information replies of `NBD_OPT_INFO` and `NBD_OPT_GO`.
    fn describe(&mut self, option: u32, request: &InfoRequest, facts: &ExportFacts) {
        let out = &mut self.output;
        let flags = facts.transmission_flags(self.style).to_be_bytes();
        let parts = [&info::EXPORT.to_be_bytes()[..], &facts.size.to_be_bytes(), &flags];
        push_reply(out, option, reply::INFO, &parts);
        if request.wants(info::NAME) {
            let parts = [&info::NAME.to_be_bytes()[..], facts.name.as_bytes()];
            push_reply(out, option, reply::INFO, &parts);
        }
        if request.wants(info::DESCRIPTION) && !facts.description.is_empty() {
            let parts = [&info::DESCRIPTION.to_be_bytes()[..], prefix(&facts.description).as_bytes()];
            push_reply(out, option, reply::INFO, &parts);
        }
        if request.wants(info::BLOCK_SIZE) {
            let minimum = 1u32.to_be_bytes(); // Storage widens what is not aligned.
            let preferred = facts.preferred_block().to_be_bytes();
            let maximum = MAX_PAYLOAD.to_be_bytes();
            let parts = [&info::BLOCK_SIZE.to_be_bytes()[..], &minimum, &preferred, &maximum];
            push_reply(out, option, reply::INFO, &parts);
        }
    }

    fn set_contexts(&mut self, request: &MetaRequest, facts: ExportFacts) -> Option<Step> {
        let wanted: HashSet<&str> = request.queries.iter().map(String::as_str).collect();
        let mut selected = facts.contexts.map_or_else(Vec::new, |collected| collected.contexts);
        selected.retain(|context| wanted.contains(context.name()));
        if selected.len() > MAX_SELECTED {
            return self.fail(option::SET_META_CONTEXT, reply::ERR_TOO_BIG, "more than 64 metadata contexts");
        }
        for (id, context) in (0u32..).zip(&selected) {
            let parts = [&id.to_be_bytes()[..], context.name().as_bytes()];
            push_reply(&mut self.output, option::SET_META_CONTEXT, reply::META_CONTEXT, &parts);
        }
        self.selected = Some((facts.name, selected));
        self.ack(option::SET_META_CONTEXT)
    }

    fn agree(&mut self, facts: ExportFacts) -> Step {
        let contexts = match self.selected.take() {
            Some((export, contexts)) if export == facts.name => contexts,
            _ => Vec::new(),
        };
        self.state = State::Finished;
        Step::Transmit(Agreement { export: facts.name, style: self.style, read_only: facts.read_only, contexts })
    }
}

/// The longest prefix of at most 4096 bytes.
fn prefix(text: &str) -> &str {
    &text[..text.floor_char_boundary(MAX_STRING)]
}

#[cfg(test)]
#[path = "negotiation_tests.rs"]
mod tests;
