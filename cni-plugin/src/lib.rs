//! The CNI plugin executable: thin, asks the agent over a UNIX socket.
