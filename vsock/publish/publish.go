// Package publish opens ports of a virtual machine's host for programs in the machine, the guest. The Server is the host's
// half, an http.Handler; the Client is the guest's. Which stream lies between them is nobody's concern here: the guest dials
// the host for everything, so a unix socket, AF_VSOCK or what a hypervisor makes of it will do. No connection is wrapped:
// what a client of a port says travels on a stream of its own, without a multiplexer, and kernels can splice it.
//
// # The protocol
//
// Version 1. Every connection that the guest makes begins with a request of HTTP/1.1 without a body,
//
//	POST /usernet/session HTTP/1.1
//	Host: usernet
//	Connection: Upgrade
//	Upgrade: usernet-ports/1
//	Usernet-Guest: 32 hexadecimal digits
//
// for a session, which is one for each guest, or, for any number of streams,
//
//	POST /usernet/stream HTTP/1.1
//	Host: usernet
//	Connection: Upgrade
//	Upgrade: usernet-ports/1
//	Usernet-Secret: 32 hexadecimal digits
//
// The answer to both is
//
//	HTTP/1.1 101 Switching Protocols
//	Connection: Upgrade
//	Upgrade: usernet-ports/1
//	Usernet-Secret: 32 hexadecimal digits
//
// with the last line in a session's answer only: its streams belong to whoever knows it. Other answers are errors, with the
// reason as text: 403 for a secret that no session has (any more), 426 for another version, 503 where there are too many
// sessions, of the guest or at all. Usernet-Guest is random; a session with the number of an older one takes its place, which ends first.
//
// A session carries lines in both directions behind that: JSON objects of at most 4096 bytes, the line feed included. The guest asks,
//
//	{"op":"publish","id":1,"proto":"tcp","addr":"127.0.0.1","port":8000,"end":8010}
//	{"op":"unpublish","id":2,"proto":"tcp","addr":"127.0.0.1","port":8000}
//
// and the host answers each question, in their order, with one of
//
//	{"id":1,"port":8000}
//	{"id":1,"error":"port 8000 is taken on the host: …","taken":true}
//
// proto is tcp or udp; no addr means all addresses of the host, of both families; no port, one that is free; end, if it is there, is
// the last port of a range to choose the first free one from. taken says that somebody has the port, which
// may be the guest itself. What is not published can be unpublished. When the session ends, however it does, its ports are
// closed with their connections. Members that are not known are ignored; a line that is not JSON ends the session. Each side
// says at least {"op":"ping"} every ten seconds, which is not answered; who has heard nothing for thirty ends the session.
//
// The answer to a stream may have one field more,
//
//	Usernet-Chunks: 1
//
// where one direction of it cannot end alone, which is so with unix sockets that are a hypervisor's.
//
// A stream stands by until the host uses it. For a connection that it has accepted, or for a client of a UDP port, that is a header of
// the PROXY protocol, version 2 (package vsock/proxy), with the client's address and the one it has dialled, which tells the
// guest which port it is; a datagram's destination is the wildcard where the host's system does not tell it. Behind the header are
// the connection's bytes, both ways, and each direction ends by itself (shutdown). A reset cannot travel: whoever sees one
// closes the stream at once, and the other side resets the connection as soon as it cannot deliver. With Usernet-Chunks, the bytes
// travel in chunks, each behind its length, 32 bits with the high byte first, 16 MiB at most; one of no bytes ends the direction, and
// a stream that ends without one was cut short. When both directions have ended, the host closes the stream, and the guest after it.
// On a stream of UDP, with chunks or without, both sides send datagrams, each behind its length, 16 bits with the high byte first; either
// side closes it when nothing has passed for 90 seconds. The guest keeps a few streams standing while it publishes anything, and replaces
// what was used; it is the host that closes them when the guest's last port is closed. When none is there, the host lets connections
// wait for a while.
package publish

import (
	"errors"
	"time"
)

// The paths of the requests that a Server answers.
const (
	SessionPath = "/usernet/session"
	StreamPath  = "/usernet/stream"
)

// Protocol is what both requests ask to upgrade to.
const Protocol = "usernet-ports/1"

const (
	guestHeader  = "Usernet-Guest"
	secretHeader = "Usernet-Secret"
)

const (
	maxLine   = 4096 // bytes, of a session
	maxHead   = 8192 // bytes, of an answer to a request
	pingEvery = 10 * time.Second
	silence   = 3 * pingEvery

	// FlowIdle is how long a UDP flow lasts without a datagram.
	FlowIdle = 90 * time.Second
)

// ErrClosed says that the Server, the Client or the session has ended.
var ErrClosed = errors.New("the session has ended")
