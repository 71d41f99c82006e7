//! A guest agent as the guest's side of QEMU's socket shows it: one client at a time, one command after the other, and
//! a state that outlives connections.

use crate::support::until;
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

/// File systems of the guest.
pub(crate) const FILE_SYSTEMS: u64 = 3;

/// How a command is answered.
#[derive(Clone, Debug)]
pub(crate) enum Answer {
    /// As it should be.
    Yes,
    /// As it should be, after a time.
    After(Duration),
    /// With an error; nothing is done.
    No(&'static str),
    /// It is done, and not answered.
    Silence,
    /// It is done, and the connection ends.
    HangUp,
}

/// What the agent is to do, and what it has done.
#[derive(Default)]
pub(crate) struct State {
    pub(crate) frozen: bool,
    /// Sent to each client first.
    pub(crate) stale: Vec<u8>,
    /// Says nothing to anybody.
    pub(crate) mute: bool,
    /// Answers to the next commands to freeze; `Yes` to those behind.
    pub(crate) freezes: Vec<Answer>,
    /// The same of commands to thaw.
    pub(crate) thaws: Vec<Answer>,
    /// Commands received, those to synchronise left out.
    pub(crate) commands: Vec<String>,
    pub(crate) clients: usize,
}

#[derive(Clone)]
pub(crate) struct ScriptedAgent(Arc<Mutex<State>>);

impl ScriptedAgent {
    pub(crate) fn listen(socket: &Path, script: impl FnOnce(&mut State)) -> Self {
        let agent = Self(Arc::default());
        script(&mut agent.state());
        let listener = UnixListener::bind(socket).expect("a socket");
        let served = agent.clone();
        std::thread::spawn(move || {
            for client in listener.incoming() {
                served.serve(client.expect("a client"));
            }
        });
        agent
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("no panic")
    }

    pub(crate) fn is_frozen(&self) -> bool {
        self.state().frozen
    }

    #[track_caller]
    pub(crate) fn until_thawed(&self) {
        until("the guest is thawed", || {
            let state = self.state();
            !state.frozen && state.commands.iter().any(|command| command == "guest-fsfreeze-thaw")
        });
    }

    fn serve(&self, mut client: UnixStream) {
        let stale = {
            let mut state = self.state();
            state.clients += 1;
            state.stale.clone()
        };
        let _ = client.write_all(&stale);
        let mut line = Vec::new();
        let mut bytes = [0; 4096];
        loop {
            let n = match client.read(&mut bytes) {
                Ok(0) | Err(_) => return,
                Ok(n) => n,
            };
            for byte in &bytes[..n] {
                match byte {
                    0xFF => {
                        line.clear();
                        if !self.state().mute {
                            // As qemu-ga does: the byte is no JSON.
                            let error = json!({"error": {"class": "GenericError", "desc": "JSON parse error"}});
                            let _ = client.write_all(format!("{error}\n").as_bytes());
                        }
                    }
                    b'\n' => {
                        let command = serde_json::from_slice(&std::mem::take(&mut line)).expect("a command");
                        match self.answer(&command) {
                            Some(answer) if !self.state().mute => drop(client.write_all(&answer)),
                            Some(_) => {}
                            None => return,
                        }
                    }
                    byte => line.push(*byte),
                }
            }
        }
    }

    /// What is said, perhaps nothing; `None` ends the connection.
    fn answer(&self, command: &Value) -> Option<Vec<u8>> {
        let name = command["execute"].as_str().expect("a command");
        if name == "guest-sync-delimited" {
            let mut answer = vec![0xFF];
            answer.extend(format!("{}\n", json!({"return": command["arguments"]["id"]})).bytes());
            return Some(answer);
        }
        let how = {
            let mut state = self.state();
            state.commands.push(name.to_owned());
            let answers = match name {
                "guest-fsfreeze-freeze" => Some(&mut state.freezes),
                "guest-fsfreeze-thaw" => Some(&mut state.thaws),
                _ => None,
            };
            answers.filter(|answers| !answers.is_empty()).map_or(Answer::Yes, |answers| answers.remove(0))
        };
        if let Answer::After(time) = how {
            std::thread::sleep(time);
        }
        if let Answer::No(text) = how {
            let error = json!({"error": {"class": "GenericError", "desc": text}});
            return Some(format!("{error}\n").into_bytes());
        }
        let mut state = self.state();
        let value = match name {
            "guest-fsfreeze-status" => json!(if state.frozen { "frozen" } else { "thawed" }),
            "guest-fsfreeze-freeze" => {
                state.frozen = true;
                json!(FILE_SYSTEMS)
            }
            "guest-fsfreeze-thaw" => json!(if std::mem::take(&mut state.frozen) { FILE_SYSTEMS } else { 0 }),
            other => panic!("{other} is not known"),
        };
        match how {
            Answer::Silence => Some(Vec::new()),
            Answer::HangUp => None,
            _ => Some(format!("{}\n", json!({"return": value})).into_bytes()),
        }
    }
}
