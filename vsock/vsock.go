// Package vsock dials and listens where a virtual machine meets its host. Hypervisors differ in what stands there: a
// socket family of the kernel, unix sockets with or without a handshake, Hyper-V's sockets. Here each is a URL
// (see Schemes), and beyond the first bytes all are the same stream.
//
// Connections are those of package net or github.com/mdlayher/vsock themselves, not wrappers: io.Copy and splice(2) work on
// them, SyscallConn gives the descriptor, and each has CloseRead and CloseWrite. Of the stream only the handshake has been
// read. The package knows nothing of what travels in it; for the first bytes of a forwarded connection see vsock/proxy.
package vsock

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime"
	"slices"
	"strings"

	"github.com/mdlayher/vsock"
)

// ErrInUse says that somebody answers on the unix socket to listen on.
var ErrInUse = errors.New("another process listens on it")

// Dial connects to a. It gives up when ctx ends, also in the middle of a handshake; the connection does not depend on ctx
// any more. An error wraps errors.ErrUnsupported if the operating system is not one that has a's scheme, and (but for Windows,
// which has numbers of its own) syscall.ECONNREFUSED if nobody listens there, as far as the hypervisor tells.
func Dial(ctx context.Context, a Addr) (net.Conn, error) {
	s, err := a.usable()
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w", a, err)
	}
	conn, err := s.dial(ctx, a)
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w", a, bare(err))
	}
	return conn, nil
}

// Listen listens at a; on the host's side of a hypervisor that has unix sockets, that is where the guest's calls to a's
// port arrive. Unix sockets are their owner's only (mode 0600) where the system has modes for them, take the place of one that
// nobody answers on any more, and go with Close. Where somebody does answer, the error wraps ErrInUse.
func Listen(a Addr) (net.Listener, error) {
	s, err := a.usable()
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", a, err)
	}
	l, err := s.listen(a)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", a, bare(err))
	}
	return l, nil
}

// PeerCID is the CID of a connection's other end, which the kernel vouches for, and false for what is no AF_VSOCK.
func PeerCID(conn net.Conn) (cid uint32, ok bool) {
	a, ok := conn.RemoteAddr().(*vsock.Addr)
	if !ok {
		return 0, false
	}
	return a.ContextID, true
}

// bare is err without the address that package net and its like put around it; the caller has said it already.
func bare(err error) error {
	if op, ok := err.(*net.OpError); ok { // outermost only: what was wrapped around it says more
		return op.Err
	}
	return err
}

// A Scheme is one way to meet a virtual machine.
type Scheme struct {
	Name    string
	Form    string   // the URL's parts by name
	Example string   // a URL that Parse takes
	Use     string   // which hypervisors, in a few words
	Systems []string // as runtime.GOOS has them; nil: all
}

type scheme struct {
	Scheme
	parse  func(*Addr, parts) error
	write  func(Addr) string
	dial   func(context.Context, Addr) (net.Conn, error)
	listen func(Addr) (net.Listener, error)
}

var schemes = []scheme{
	{
		Scheme: Scheme{"vsock", "vsock://CID:PORT", "vsock://2:1024",
			"AF_VSOCK; CID host is 2, local 1, and none listens for everybody", []string{"linux"}},
		parse: parseVsock, write: writeVsock, dial: dialVsock, listen: listenVsock,
	},
	{
		Scheme: Scheme{"unix", "unix:///PATH", "unix:///run/vm3/port1024.sock",
			"a plain unix socket, as vfkit and krunkit have for each port", nil},
		parse: parseUnix, write: writeUnix, dial: dialPlain, listen: listenPlain,
	},
	{
		Scheme: Scheme{"hybrid", "hybrid:///PATH:PORT", "hybrid:///run/vm3/vm.vsock:1024",
			"Firecracker, Cloud Hypervisor, vhost-device-vsock: CONNECT on PATH, calls of the guest on PATH_PORT", nil},
		parse: parsePathPort, write: writePathPort, dial: dialHybrid, listen: listenHybrid,
	},
	{
		Scheme: Scheme{"hyperkit", "hyperkit:///DIR:PORT", "hyperkit:///Users/me/vm:1024",
			"HyperKit: DIR/connect, calls of the guest on DIR/00000002.PORT in hexadecimal; also vsock://null:PORT/DIR", nil},
		parse: parsePathPort, write: writePathPort, dial: dialHyperKit, listen: listenHyperKit,
	},
	{
		Scheme: Scheme{"hvsock", "hvsock://VMID/SERVICE", "hvsock://wildcard/1024",
			"Hyper-V: VMID is a GUID, wildcard, children, loopback or parent, SERVICE a GUID or a port; also vsock://SERVICE",
			[]string{"windows"}},
		parse: parseHV, write: writeHV, dial: dialHV, listen: listenHV,
	},
	{
		Scheme: Scheme{"tcp", "tcp://HOST:PORT", "tcp://127.0.0.1:1024", "TCP, open to whoever reaches the port", nil},
		parse:  parseTCP, write: writeTCP, dial: dialTCP, listen: listenTCP,
	},
	{
		Scheme: Scheme{"fd", "fd:NAME", "fd:usernet-vsock.socket",
			"a listener that systemd passes, of any family, by FileDescriptorName or number", []string{"linux"}},
		parse: parseFD, write: writeFD, dial: dialFD, listen: listenFD,
	},
}

// Schemes returns what Parse knows, for manuals and usage texts.
func Schemes() []Scheme {
	list := make([]Scheme, len(schemes))
	for i, s := range schemes {
		list[i] = s.Scheme
		list[i].Systems = slices.Clone(s.Systems)
	}
	return list
}

// usable returns how to use a, if this system can.
func (a Addr) usable() (*scheme, error) {
	s := a.kind
	if s == nil {
		return nil, errors.New("no address")
	}
	if s.Systems != nil && !slices.Contains(s.Systems, runtime.GOOS) {
		return nil, fmt.Errorf("%s is there on %s only: %w", s.Name, strings.Join(s.Systems, " and "), errors.ErrUnsupported)
	}
	return s, nil
}
