//! Fields of what comes from a store: bounded, never past the end. Little-endian.

use crate::error::DamageReason;

type Field<T> = Result<T, DamageReason>;

/// Takes fields off the front of bytes that may be anything.
pub(crate) struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    pub(crate) fn of(bytes: &'a [u8]) -> Fields<'a> {
        Fields(bytes)
    }

    pub(crate) fn take(&mut self, count: usize) -> Field<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(count).ok_or(DamageReason::Short)?;
        self.0 = rest;
        Ok(head)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Field<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk().ok_or(DamageReason::Short)?;
        self.0 = rest;
        Ok(*head)
    }

    pub(crate) fn u8(&mut self) -> Field<u8> {
        self.array::<1>().map(|[byte]| byte)
    }

    pub(crate) fn u16(&mut self) -> Field<u16> {
        self.array().map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self) -> Field<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Field<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// Bytes behind their number (4 bytes), at most `limit`.
    pub(crate) fn bytes(&mut self, limit: usize) -> Field<Vec<u8>> {
        let count = self.u32()? as usize;
        if count > limit {
            return Err(DamageReason::Field);
        }
        self.take(count).map(<[u8]>::to_vec)
    }

    pub(crate) fn text(&mut self, limit: usize) -> Field<String> {
        String::from_utf8(self.bytes(limit)?).map_err(|_| DamageReason::Field)
    }

    /// A number of things of at least `size` bytes each: no more than there are bytes for.
    pub(crate) fn count(&mut self, size: usize) -> Field<usize> {
        let count = self.u32()? as usize;
        if count > self.0.len() / size { Err(DamageReason::Short) } else { Ok(count) }
    }

    pub(crate) fn end(self) -> Field<()> {
        if self.0.is_empty() { Ok(()) } else { Err(DamageReason::Long) }
    }
}

/// Appends bytes behind their number.
pub(crate) fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend((bytes.len() as u32).to_le_bytes());
    out.extend(bytes);
}
