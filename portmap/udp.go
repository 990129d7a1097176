package portmap

import (
	"context"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/usernet/usernet/internal/splice"
)

// datagram holds every UDP payload. Flows share a pool of them and have one only while they handle a datagram, so
// that thousands of idle flows need no memory to speak of.
type datagram [64 << 10]byte

func newDatagram() any { return new(datagram) }

// serveUDP relays what arrives at ln to target, in one flow for each client. It returns when ctx has ended and the
// last of its flows has gone.
func (r *server) serveUDP(ctx context.Context, ln *net.UDPConn, target netip.AddrPort, flows *flowTable) {
	defer context.AfterFunc(ctx, func() { ln.SetDeadline(past) })()
	var replies sync.WaitGroup
	defer replies.Wait()
	buf, oob := make([]byte, len(datagram{})), make([]byte, destinationSpace())
	var p splice.Pause
	for {
		n, oobn, _, from, err := ln.ReadMsgUDPAddrPort(buf, oob)
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			if p.First() {
				r.log.Warn("cannot read datagrams for a while", "err", err)
			}
			select {
			case <-time.After(p.Next()):
			case <-ctx.Done():
			}
			continue
		}
		p.Reset()
		key := flowKey{client: from}
		if oobn > 0 {
			var unicast bool
			if key.local, unicast = parseDestination(oob[:oobn]); !unicast {
				continue
			}
		}
		f := flows.use(key)
		if f == nil {
			if f, err = r.newFlow(key, ln, target); err != nil {
				r.counters.refused.Add(1)
				r.log.Debug("refused a flow", "client", from, "err", err)
				continue
			}
			flows.add(f)
			replies.Go(func() { r.serveFlow(ctx, f, flows) })
		}
		f.send(buf[:n])
	}
}
