package usermode

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/rights"
)

// A gateway without root lives in two processes: an ordinary one, whose sockets reach the world, and one inside, which
// is root in a user namespace of its own and has the fabric. The one inside declares the fabric and lends what the
// other needs of it: the TUN device and the listeners once, and sockets whenever they run out. A socket belongs to the
// namespace that it was made in, whoever has it; so all traffic is carried by the first, and none crosses between the
// two.
//
// They speak by package rights.

// lent is the first message, with the descriptors of the TUN device, unless the network is internal, and of the
// listeners.
type lent struct {
	Offload, IPv6 bool
	Listeners     []netip.AddrPort `json:",omitempty"`
	FastErr       string           `json:",omitempty"`
	DivertErr     string           `json:",omitempty"`
	Err           string           `json:",omitempty"` // the fabric could not be declared
}

// wanted asks for sockets, and answers come with N descriptors.
type wanted struct {
	Kind int // SOCK_STREAM or SOCK_DGRAM
	IPv6 bool
	N    int
	Err  string `json:",omitempty"` // of an answer
}

// Lend declares the calling process's own namespace the fabric of cfg and lends it to the process at the other end of
// conn, until that closes it. ready is called when the fabric stands and before the other end learns of it.
func Lend(cfg Config, conn *net.UnixConn, ready func() error) error {
	f, err := declare(cfg)
	if err == nil {
		defer f.undo.Close()
		err = ready()
	}
	if err != nil {
		return errors.Join(err, rights.Send(conn, lent{Err: err.Error()}))
	}
	if err := f.lend(conn); err != nil {
		return err
	}
	for {
		var w wanted
		if _, err := rights.Receive(conn, &w); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		if err := w.answer(conn); err != nil {
			return err
		}
	}
}

// lend sends what the gateway needs of f.
func (f *fabric) lend(conn *net.UnixConn) error {
	l := lent{Offload: f.offload, IPv6: f.ipv6, FastErr: asText(f.fastErr), DivertErr: asText(f.divertErr)}
	var fds []int
	if f.tun != nil {
		raw, err := f.tun.SyscallConn()
		if err != nil {
			return err
		}
		raw.Control(func(fd uintptr) { fds = append(fds, int(fd)) })
	}
	for _, ln := range f.listeners {
		l.Listeners = append(l.Listeners, ln.at)
		fds = append(fds, ln.fd)
	}
	return rights.Send(conn, l, fds...)
}

// answer makes the sockets and sends them.
func (w wanted) answer(conn *net.UnixConn) error {
	a := netip.IPv4Unspecified()
	if w.IPv6 {
		a = netip.IPv6Unspecified()
	}
	kind := unix.SOCK_STREAM
	if w.Kind == unix.SOCK_DGRAM {
		kind = unix.SOCK_DGRAM
	}
	fds, err := makeSockets(kind, a, min(w.N, socketBatch))
	defer func() {
		for _, fd := range fds {
			unix.Close(fd)
		}
	}()
	return rights.Send(conn, wanted{Kind: w.Kind, IPv6: w.IPv6, N: len(fds), Err: asText(err)}, fds...)
}

// Borrow makes the gateway of a fabric that the process at the other end of conn lends. The gateway owns conn; with the
// end of it the fabric's process ends too.
func Borrow(cfg Config, conn *net.UnixConn) (_ *Gateway, err error) {
	f := newFabric(cfg)
	f.undo.Push(conn.Close)
	defer func() {
		if err != nil {
			err = errors.Join(err, f.undo.Close())
		}
	}()
	var l lent
	fds, err := rights.Receive(conn, &l)
	if err != nil {
		return nil, fmt.Errorf("borrow the fabric: %w", err)
	}
	for i, fd := range fds {
		if i > 0 || f.cfg.Internal {
			f.undo.Push(func() error { return unix.Close(fd) })
			continue
		}
		f.tun = tunFile(fd)
		f.undo.Push(f.tun.Close)
	}
	if l.Err != "" {
		return nil, errors.New(l.Err)
	}
	want := len(l.Listeners) + 1
	if f.cfg.Internal {
		want = 0
	}
	if len(fds) != want {
		return nil, fmt.Errorf("borrow the fabric: %d descriptors came, want %d", len(fds), want)
	}
	f.offload, f.ipv6 = l.Offload, l.IPv6
	f.fastErr, f.divertErr = asError(l.FastErr), asError(l.DivertErr)
	for i, at := range l.Listeners {
		f.listeners = append(f.listeners, &transparent{fd: fds[1+i], at: at})
	}
	return newGateway(f, &borrowed{conn: conn})
}

// asError is the error that another process told as text; "" is none.
func asError(text string) error {
	if text == "" {
		return nil
	}
	return errors.New(text)
}

func asText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// borrowed is the socketMaker for another process's fabric.
type borrowed struct {
	mu   sync.Mutex
	conn *net.UnixConn
}

// borrowTimeout bounds the wait for sockets, during which nobody else is served: the other process may be stopped.
const borrowTimeout = time.Second

func (b *borrowed) sockets(kind int, a netip.Addr, n int) ([]int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.conn.SetDeadline(time.Now().Add(borrowTimeout))
	w := wanted{Kind: kind, IPv6: a.Is6(), N: n}
	if err := rights.Send(b.conn, w); err != nil {
		return nil, fmt.Errorf("borrow sockets: %w", err)
	}
	fds, err := rights.Receive(b.conn, &w)
	switch {
	case err != nil:
		return nil, fmt.Errorf("borrow sockets: %w", err)
	case w.Err != "":
		return nil, errors.New(w.Err)
	case len(fds) == 0:
		return nil, errors.New("borrow sockets: none came")
	}
	return fds, nil
}
