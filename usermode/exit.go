package usermode

import (
	"net/netip"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/usernet/usernet/internal/icmperror"
	"github.com/usernet/usernet/internal/nonblock"
)

// exit is what UDP flows and the echo relay have in common: the TUN that they answer to, the poller of their sockets
// and the memory they use for one packet at a time. It belongs to the goroutine that receives from the TUN.
type exit struct {
	cfg    netstackConfig
	stack  *stack.Stack // for packets that have to be cut
	link   *link
	poller *poller
	in     *inbox // nil until there is a socket
	errors icmperror.Limit
	queue  icmperror.Queue
	packet [virtioHdrLen + maxError6]byte // an error message
	id     uint16                         // of the last IPv4 packet

	lost atomic.Uint64 // packets to containers that the TUN did not take
}

// inbox is where to receive. It is shared: what is in it is gone with the next call.
func (x *exit) inbox() *inbox {
	if x.in == nil {
		x.in = newInbox()
	}
	return x.in
}

func (x *exit) nextID() uint16 {
	x.id++
	return x.id
}

// inject sends a frame to the container.
func (x *exit) inject(frame []byte) {
	if x.link.inject(frame) != nil {
		x.lost.Add(1)
	}
}

// fits tells whether a frame needs no cutting.
func (x *exit) fits(frame []byte) bool { return len(frame)-virtioHdrLen <= int(x.link.MTU()) }

// report sends e, about the packet quoted, which went to dst, to the container client, unless it got too many.
func (x *exit) report(e icmperror.Message, client, dst netip.Addr, quoted ...[]byte) {
	if x.errors.Take(client, time.Now()) {
		x.inject(putError(x.packet[:], e, client, dst, x.nextID(), quoted...))
	}
}

// pathOptions are the settings of a socket that follow the packets of containers.
type pathOptions struct {
	hops  uint8
	whole bool
}

// set makes the socket send with TTL and DF as asked for, which mostly they are already.
func (o *pathOptions) set(fd int, v4 bool, hops uint8, whole bool) {
	if *o == (pathOptions{hops, whole}) {
		return
	}
	level, ttl, discover, value := unix.IPPROTO_IPV6, unix.IPV6_UNICAST_HOPS, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_DONT
	if v4 {
		level, ttl, discover, value = unix.IPPROTO_IP, unix.IP_TTL, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DONT
	}
	if whole {
		value = unix.IP_PMTUDISC_DO // IPv6 has the same number
	}
	// Zero is what a new socket has; a packet on its way has more.
	if o.hops != hops {
		unix.SetsockoptInt(fd, level, ttl, int(max(hops, 1)))
	}
	if o.whole != whole || o.hops == 0 {
		unix.SetsockoptInt(fd, level, discover, value)
	}
	*o = pathOptions{hops, whole}
}

// roomy gives a socket a receive or send buffer, as long as the kernel allows.
func roomy(fd, force, option, size int) {
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, force, size) != nil {
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, option, size)
	}
}

// write sends the parts as one datagram on a connected socket. It does not wait.
func write(fd int, parts *[2][]byte) error {
	if len(parts[1]) == 0 {
		return nonblock.Send(fd, parts[0]) // of nothing at all, writev(2) makes no datagram
	}
	iovs := [2]unix.Iovec{nonblock.Iovec(parts[0]), nonblock.Iovec(parts[1])}
	_, err := nonblock.Writev(fd, iovs[:])
	return err
}
