//go:build unix

package l2

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// vfkitMagic is what vfkit once sent first, to make itself known. It is no frame.
const vfkitMagic = "VFKT"

// AwaitPeer waits for the first datagram on a socket that is bound but not connected, of type SOCK_DGRAM, and makes a link to
// whoever has sent it; opts.Framing is ignored. The sender must have a name itself. The link is on a copy of c, so c is the
// caller's, and AwaitPeer may be called again when the link has ended. It returns ctx's cause if ctx ends.
//
// One socket serves one machine at a time: the kernel lets only the peer of a connected socket send to it, and of one that
// is not connected it does not tell when there is room again.
func AwaitPeer(ctx context.Context, c PacketConn, opts Options) (*Link, error) {
	if u, ok := c.(*net.UnixConn); ok { // as gvproxy has them; the kernel may give less
		u.SetWriteBuffer(1 << 20)
		u.SetReadBuffer(4 << 20)
	}
	if err := c.SetReadDeadline(time.Time{}); err != nil { // it may be from last time
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { c.SetReadDeadline(time.Unix(1, 0)) })
	peer, err := awaitPeer(c)
	if !stop() {
		return nil, context.Cause(ctx)
	}
	if err != nil {
		return nil, fmt.Errorf("wait for a datagram on %s: %w", c.LocalAddr(), err)
	}
	l, err := connectedCopy(c, opts)
	if err != nil {
		return nil, fmt.Errorf("connect %s: %w", c.LocalAddr(), err)
	}
	if to, ok := peer.(*unix.SockaddrUnix); ok {
		l.watch = func(ctx context.Context) error { return watchPeer(ctx, c, to) }
	}
	return l, nil
}

// awaitPeer connects c to the sender of its first datagram, which is left where it is.
func awaitPeer(c PacketConn) (unix.Sockaddr, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	var from unix.Sockaddr
	var failed error
	buf := make([]byte, len(vfkitMagic)+1)
	err = raw.Control(func(fd uintptr) { failed = disconnect(int(fd)) })
	if err = errors.Join(err, failed); err != nil {
		return nil, fmt.Errorf("disconnect: %w", err)
	}
	err = raw.Read(func(fd uintptr) bool {
		from, failed = firstSender(int(fd), buf)
		return !errors.Is(failed, unix.EAGAIN)
	})
	if err == nil {
		err = failed
	}
	return from, err
}

// firstSender looks at the datagrams that have come, throws away what cannot be answered, and connects to the first sender.
func firstSender(fd int, buf []byte) (unix.Sockaddr, error) {
	for {
		n, from, err := unix.Recvfrom(fd, buf, unix.MSG_PEEK|unix.MSG_DONTWAIT)
		if errors.Is(err, unix.EINTR) || errors.Is(err, unix.ECONNRESET) {
			continue
		}
		if err != nil {
			return nil, err
		}
		u, isUnix := from.(*unix.SockaddrUnix)
		nameless := from == nil || isUnix && u.Name == ""
		if nameless || string(buf[:n]) == vfkitMagic {
			if _, _, err := unix.Recvfrom(fd, buf, unix.MSG_DONTWAIT); err != nil {
				return nil, err
			}
		}
		if nameless {
			continue
		}
		if err := unix.Connect(fd, from); err != nil {
			if _, _, err := unix.Recvfrom(fd, buf, unix.MSG_DONTWAIT); err != nil {
				return nil, err
			}
			continue // it has gone meanwhile
		}
		return from, nil
	}
}

// connectedCopy makes a link on a descriptor of its own, so that closing it leaves the socket.
func connectedCopy(c PacketConn, opts Options) (*Link, error) {
	f, err := fileOf(c)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	dup, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	l, err := Packets(dup.(PacketConn), opts)
	if err != nil {
		dup.Close()
	}
	return l, err
}

func fileOf(c PacketConn) (*os.File, error) {
	if f, ok := c.(interface{ File() (*os.File, error) }); ok {
		return f.File()
	}
	return nil, fmt.Errorf("descriptor of a %T: %w", c, errors.ErrUnsupported)
}

// errPeerGone says that the machine at the other end of datagram sockets is no more.
var errPeerGone = errors.New("peer is gone")

// watchEvery is how often it is looked whether a peer is still there.
const watchEvery = time.Second

// watchPeer returns when nobody has the peer's name any more. The kernel does not tell a connected datagram socket before it
// sends; until then nobody else could send to it, and the machine's next start would find no network.
func watchPeer(ctx context.Context, c PacketConn, peer *unix.SockaddrUnix) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		var gone error
		err := raw.Control(func(fd uintptr) {
			if gone = unix.Connect(int(fd), peer); gone != nil {
				disconnect(int(fd)) // the next machine may call before AwaitPeer does
			}
		})
		if err != nil {
			return err
		}
		if gone != nil {
			return fmt.Errorf("%s: %w: %w", peer.Name, errPeerGone, gone)
		}
	}
}
