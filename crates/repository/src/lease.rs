//! The lease of a session: what keeps `prune` from deleting what the session relies upon.

use crate::error::{RepositoryError, Result};
use crate::id::Id;
use crate::node::Reference;
use crate::records::{self, Lease, expired_name, lease_name};
use crate::repository::Inner;
use crate::store::StoreErrorKind;
use std::sync::Arc;

/// How often a session renews its lease, in milliseconds.
const RENEW_MS: u64 = 5 * 60 * 1000;

/// A lease that is held.
pub(crate) struct Held {
    inner: Arc<Inner>,
    pub(crate) lease: Lease,
}

impl Held {
    /// Puts a lease that stops every deletion until it is settled.
    pub(crate) fn take(inner: Arc<Inner>, prunes: bool) -> Result<Held> {
        let lease = Lease {
            id: Id::random(&*inner.host)?,
            prunes,
            done: false,
            settled: false,
            counter: 0,
            renewed_ms: inner.host.now_ms(),
            point: None,
            roots: Vec::new(),
            seen: Vec::new(),
        };
        records::put_new(&*inner.store, &*inner.host, &inner.secret, &lease_name(lease.id), lease.to_bytes())?;
        Ok(Held { inner, lease })
    }

    /// Says what is inherited from, and which tombstones are known. Call after both were read, and those after `take`.
    pub(crate) fn settle(&mut self, roots: Vec<(u8, Reference)>, seen: Vec<Id>) -> Result<()> {
        (self.lease.roots, self.lease.seen, self.lease.settled) = (roots, seen, true);
        self.put()
    }

    /// Renews if it is time to. A clock that went back is a reason too.
    pub(crate) fn renew_if_due(&mut self) -> Result<()> {
        let now = self.inner.host.now_ms();
        if now < self.lease.renewed_ms || now - self.lease.renewed_ms >= RENEW_MS { self.renew() } else { Ok(()) }
    }

    pub(crate) fn renew(&mut self) -> Result<()> {
        self.check()?;
        self.put()
    }

    /// Fails if a prune has declared the lease expired.
    pub(crate) fn check(&self) -> Result<()> {
        let lost = || RepositoryError::LeaseLost { lease: lease_name(self.lease.id) };
        let expired = expired_name(self.lease.id);
        match self.inner.store.look(&expired) {
            Ok(_) => return Err(lost()),
            Err(e) if e.kind == StoreErrorKind::Missing => {}
            Err(e) => return Err(RepositoryError::store(&expired, "look at")(e)),
        }
        let name = lease_name(self.lease.id);
        match self.inner.store.look(&name) {
            Ok(_) => Ok(()),
            Err(e) if e.kind == StoreErrorKind::Missing => Err(lost()),
            Err(e) => Err(RepositoryError::store(&name, "look at")(e)),
        }
    }

    fn put(&mut self) -> Result<()> {
        self.lease.counter += 1;
        self.lease.renewed_ms = self.inner.host.now_ms();
        let Inner { store, host, secret, .. } = &*self.inner;
        records::put(&**store, &**host, secret, &lease_name(self.lease.id), self.lease.to_bytes())
    }

    /// The end of a session that has made a point, or none. The object stays until a prune removes it: it leads that prune to the point even if
    /// the list of points is late.
    pub(crate) fn end(mut self) -> Result<()> {
        self.lease.done = true;
        self.put()
    }
}

impl Drop for Held {
    /// A session that failed before it tried to put a point ends its lease. After that the put may still arrive, however late: the lease has to expire.
    fn drop(&mut self) {
        if !self.lease.done && self.lease.point.is_none() {
            self.lease.done = true;
            let _ = self.put(); // If it fails, the lease expires.
        }
    }
}
