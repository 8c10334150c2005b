//! Pipes and terminals between the shim and a process.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use anyhow::Context;
use nix::fcntl::OFlag;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use nix::unistd::pipe2;

use crate::log_file::Stream;
use crate::runtime::ChildStdio;

/// The shim's ends of a process's streams.
#[derive(Default)]
pub(crate) struct Stdio {
    /// Where standard input goes; the terminal itself for a terminal.
    pub(crate) stdin: Option<File>,
    pub(crate) stdout: Option<File>,
    pub(crate) stderr: Option<File>,
    /// Input not yet taken by the process.
    pub(crate) pending: Vec<u8>,
    /// Close `stdin` once `pending` is written.
    pub(crate) close_stdin: bool,
    pub(crate) tty: bool,
    console: Option<(UnixListener, PathBuf)>,
}

impl Stdio {
    /// Pipes for a process without a terminal.
    pub(crate) fn pipes(stdin: bool) -> anyhow::Result<(Self, ChildStdio)> {
        let mut ours = Self::default();
        let mut theirs = ChildStdio::default();
        if stdin {
            let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
            nonblocking(&write)?;
            theirs.stdin = Some(read);
            ours.stdin = Some(write.into());
        } else {
            theirs.stdin = Some(File::open("/dev/null")?.into());
        }
        let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
        nonblocking(&read)?;
        (ours.stdout, theirs.stdout) = (Some(read.into()), Some(write));
        let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
        nonblocking(&read)?;
        (ours.stderr, theirs.stderr) = (Some(read.into()), Some(write));
        Ok((ours, theirs))
    }

    /// A socket on which the terminal of a process will arrive.
    pub(crate) fn terminal(socket: &Path) -> anyhow::Result<(Self, ChildStdio)> {
        let _ = std::fs::remove_file(socket);
        let listener =
            bind_short(socket).with_context(|| format!("cannot listen on {}", socket.display()))?;
        listener.set_nonblocking(true)?;
        let ours = Self {
            tty: true,
            console: Some((listener, socket.to_owned())),
            ..Self::default()
        };
        let theirs = ChildStdio {
            console: Some(socket.to_owned()),
            ..ChildStdio::default()
        };
        Ok((ours, theirs))
    }

    /// Takes the terminal off the console socket; call when the process has started.
    pub(crate) fn accept_terminal(&mut self) -> anyhow::Result<()> {
        let Some((listener, path)) = self.console.take() else {
            return Ok(());
        };
        let _ = std::fs::remove_file(&path);
        let (stream, _) = listener.accept().context("no terminal has arrived")?;
        let mut byte = [0u8; 64];
        let mut iov = [io::IoSliceMut::new(&mut byte)];
        let mut space = nix::cmsg_space!([i32; 1]);
        let message = recvmsg::<()>(
            stream.as_raw_fd(),
            &mut iov,
            Some(&mut space),
            MsgFlags::MSG_CMSG_CLOEXEC,
        )
        .context("cannot receive the terminal")?;
        let mut master = None;
        for part in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(fds) = part {
                for fd in fds {
                    // SAFETY: the kernel has just made this descriptor for us.
                    master = Some(unsafe { OwnedFd::from_raw_fd(fd) });
                }
            }
        }
        let master = master.context("the console socket carried no terminal")?;
        nonblocking(&master)?;
        let master = File::from(master);
        self.stdin = Some(master.try_clone()?);
        self.stdout = Some(master);
        Ok(())
    }

    /// Sets the terminal's size; nothing to do without a terminal.
    pub(crate) fn resize(&self, width: u16, height: u16) {
        if let (true, Some(file)) = (self.tty, &self.stdin) {
            let size = libc::winsize {
                ws_row: height,
                ws_col: width,
                ws_xpixel: 0,
                ws_ypixel: 0,
            };
            // SAFETY: TIOCSWINSZ reads one winsize that lives through the call.
            unsafe { libc::ioctl(file.as_raw_fd(), libc::TIOCSWINSZ, &size) };
        }
    }

    /// Queues input and writes what the process takes.
    pub(crate) fn feed(&mut self, data: &[u8]) {
        if self.stdin.is_some() && !self.close_stdin {
            self.pending.extend_from_slice(data);
            self.flush();
        }
    }

    /// Ends standard input after what is queued. On a terminal that is ^D's job.
    pub(crate) fn end_input(&mut self) {
        if !self.tty {
            self.close_stdin = true;
            self.flush();
        }
    }

    /// Writes queued input as far as the process takes it.
    pub(crate) fn flush(&mut self) {
        use std::io::Write;
        while let (Some(file), false) = (&mut self.stdin, self.pending.is_empty()) {
            match file.write(&self.pending) {
                Ok(n) => {
                    self.pending.drain(..n);
                }
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => return,
                Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => {
                    self.pending.clear();
                    self.stdin = None;
                }
            }
        }
        if self.close_stdin {
            self.stdin = None;
        }
    }

    /// Reads one piece of a stream: `None` when nothing is there now. The stream
    /// is closed at its end.
    pub(crate) fn read(&mut self, stream: Stream, buffer: &mut [u8]) -> Option<usize> {
        let slot = match stream {
            Stream::Stdout => &mut self.stdout,
            Stream::Stderr => &mut self.stderr,
        };
        let file = slot.as_mut()?;
        loop {
            match file.read(buffer) {
                Ok(n) if n > 0 => return Some(n),
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => return None,
                Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
                // A terminal answers EIO once its last user is gone.
                _ => {
                    *slot = None;
                    return None;
                }
            }
        }
    }
}

/// Binds a socket whose path may be longer than the 108 bytes of an address.
pub(crate) fn bind_short(path: &Path) -> io::Result<UnixListener> {
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::Error::other("the socket's path has no directory"));
    };
    let dir = File::open(dir)?;
    UnixListener::bind(Path::new(&format!("/proc/self/fd/{}", dir.as_raw_fd())).join(name))
}

fn nonblocking(fd: &impl AsRawFd) -> io::Result<()> {
    // SAFETY: plain fcntl on an open descriptor.
    if unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
