//! Reading the data of options, writing replies to them (proto.md, "Option types", "Option reply types").

use crate::wire::{Cursor, MAX_STRING, OPTION_REPLY_MAGIC};

/// Most queries in one option; more are answered with `NBD_REP_ERR_TOO_BIG`.
pub(crate) const MAX_QUERIES: u32 = 256;

/// Why an option's data was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BadOption {
    /// Lengths that contradict each other, strings that are none.
    Malformed(&'static str),
    /// More than this server takes.
    TooBig(&'static str),
}

/// The data of `NBD_OPT_INFO` and `NBD_OPT_GO`.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct InfoRequest {
    pub(crate) name: String,
    /// Information types asked for.
    pub(crate) wanted: Vec<u16>,
}

/// The data of `NBD_OPT_LIST_META_CONTEXT` and `NBD_OPT_SET_META_CONTEXT`.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct MetaRequest {
    pub(crate) name: String,
    pub(crate) queries: Vec<String>,
}

/// Checks a string of the protocol: UTF-8, no NUL, at most 4096 bytes.
pub(crate) fn string(bytes: &[u8]) -> Result<String, BadOption> {
    if bytes.len() > MAX_STRING {
        return Err(BadOption::Malformed("string is longer than 4096 bytes"));
    }
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.contains('\0') => Ok(text.to_owned()),
        Ok(_) => Err(BadOption::Malformed("string contains NUL")),
        Err(_) => Err(BadOption::Malformed("string is not UTF-8")),
    }
}

/// A string behind its 32-bit length.
fn counted_string(cursor: &mut Cursor<'_>) -> Result<String, BadOption> {
    const SHORT: BadOption = BadOption::Malformed("string reaches beyond the option's data");
    let len = cursor.u32().ok_or(SHORT)?;
    string(cursor.bytes(usize::try_from(len).map_err(|_| SHORT)?).ok_or(SHORT)?)
}

impl InfoRequest {
    pub(crate) fn parse(data: &[u8]) -> Result<Self, BadOption> {
        let mut cursor = Cursor(data);
        let name = counted_string(&mut cursor)?;
        let count = cursor.u16().ok_or(BadOption::Malformed("number of information requests is missing"))?;
        let mut wanted = Vec::with_capacity(usize::from(count).min(cursor.0.len() / 2));
        for _ in 0..count {
            wanted.push(cursor.u16().ok_or(BadOption::Malformed("information requests are missing"))?);
        }
        if !cursor.is_empty() {
            return Err(BadOption::Malformed("data behind the information requests"));
        }
        Ok(Self { name, wanted })
    }

    pub(crate) fn wants(&self, information: u16) -> bool {
        self.wanted.contains(&information)
    }
}

impl MetaRequest {
    pub(crate) fn parse(data: &[u8]) -> Result<Self, BadOption> {
        let mut cursor = Cursor(data);
        let name = counted_string(&mut cursor)?;
        let count = cursor.u32().ok_or(BadOption::Malformed("number of queries is missing"))?;
        if count > MAX_QUERIES {
            return Err(BadOption::TooBig("more than 256 queries"));
        }
        let queries = (0..count).map(|_| counted_string(&mut cursor)).collect::<Result<_, _>>()?;
        if !cursor.is_empty() {
            return Err(BadOption::Malformed("data behind the queries"));
        }
        Ok(Self { name, queries })
    }
}

/// Appends one reply to an option. The parts are its data, in a row.
pub(crate) fn push_reply(out: &mut Vec<u8>, option: u32, kind: u32, parts: &[&[u8]]) {
    let len: usize = parts.iter().map(|part| part.len()).sum();
    // Callers' parts are strings of at most 4096 bytes and a few numbers.
    let len = u32::try_from(len).expect("an option's reply is short");
    out.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&len.to_be_bytes());
    for part in parts {
        out.extend_from_slice(part);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn information_requests() {
        let data = [0, 0, 0, 1, b'a', 0, 2, 0, 3, 0, 1];
        assert_eq!(InfoRequest::parse(&data), Ok(InfoRequest { name: "a".into(), wanted: vec![3, 1] }));
        for cut in 0..data.len() {
            assert!(matches!(InfoRequest::parse(&data[..cut]), Err(BadOption::Malformed(_))), "cut at {cut}");
        }
        let mut longer = data.to_vec();
        longer.push(0);
        assert!(InfoRequest::parse(&longer).is_err());
        assert!(InfoRequest::parse(&[0xff, 0xff, 0xff, 0xff, 0, 0]).is_err());
    }

    #[test]
    fn queries() {
        let data = [0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 2, b'x', b':'];
        assert_eq!(MetaRequest::parse(&data), Ok(MetaRequest { name: String::new(), queries: vec!["x:".into()] }));
        for cut in 0..data.len() {
            assert!(matches!(MetaRequest::parse(&data[..cut]), Err(BadOption::Malformed(_))), "cut at {cut}");
        }
        assert_eq!(
            MetaRequest::parse(&[0, 0, 0, 0, 0xff, 0, 0, 0]),
            Err(BadOption::TooBig("more than 256 queries")),
            "a count is not believed"
        );
    }

    #[test]
    fn strings() {
        assert_eq!(string("größe".as_bytes()), Ok("größe".into()));
        assert!(string(&[0xff]).is_err());
        assert!(string(b"a\0b").is_err());
        assert!(string(&[b'a'; 4096]).is_ok());
        assert!(string(&[b'a'; 4097]).is_err());
    }
}
