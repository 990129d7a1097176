package flows

import (
	"errors"
	"net/netip"
	"sync"
	"sync/atomic"

	"github.com/usernet/usernet/internal/icmperror"
)

// gone is the place of a flow that the table does not have any more.
const gone = -1

// errEnded is that a flow ended while somebody was about to use it.
var errEnded = errors.New("the flow has ended")

// udpFlow is one flow. Its socket is of the system's own kind: dial opens it, watch has its datagrams received from then
// on, send sends, close ends everything.
type udpFlow struct {
	table *udpTable
	key   flowKey
	host  netip.AddrPort // what the socket is connected to

	sending sync.Mutex
	path    pathOptions // under sending
	single  bool        // likewise: the system takes one datagram at a time
	socket

	last     atomic.Int64 // when something was sent or received, of Flows.now
	answered atomic.Bool  // something was received

	// Under the table's lock.
	client           *udpClient
	inClient, inList int // its places in client.flows and table.list
}

// pathOptions are the settings of a socket that follow the packets of guests.
type pathOptions struct {
	hops  uint8
	whole bool
}

// touch notes that something was received.
func (f *udpFlow) touch() {
	f.last.Store(int64(f.table.now()))
	if !f.answered.Load() {
		f.answered.Store(true)
	}
}

// deliver sends datagrams from the destination to the guest.
func (f *udpFlow) deliver(payloads [][]byte) { f.table.cfg.SendUDP(f.key.dst, f.key.client, payloads) }

// reject tells the guest of an error about a datagram that began with payload. The packet itself is gone; what programs
// and kernels look at is its addresses and its UDP header, and from those it is made again.
func (f *udpFlow) reject(e icmperror.Message, payload []byte) {
	if !isShown(e.From) || e.From == f.host.Addr() {
		e.From = f.key.dst.Addr()
	}
	var b [ipv6HdrLen + udpHdrLen]byte
	quoted := putUDP(b[:], f.key.client, f.key.dst, len(payload))
	f.table.report(e, f.key.client.Addr(), f.key.dst.Addr(), quoted, payload)
}
