package tcprelay

import (
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// Handshakes are SYN-ACKs that wait for a goroutine of their own to send them.
//
// netstack sends a SYN-ACK with its endpoint locked. The write wakes the client's kernel or runs it, often on this very processor, and
// the answer is back before the write has returned: a goroutine of netstack would spin on the lock meanwhile, on a processor that
// the write may be waiting for. That was a quarter of what a gateway used for one connection after the other.
type Handshakes chan *stack.PacketBuffer

// NewHandshakes has room for as many as come at once.
func NewHandshakes() Handshakes { return make(Handshakes, 256) }

// Take leaves pkt to Send if it is a SYN-ACK; false: it is not, or too many wait already, and whoever has it sends it.
func (h Handshakes) Take(pkt *stack.PacketBuffer) bool {
	const both = header.TCPFlagSyn | header.TCPFlagAck
	tcp := pkt.TransportHeader().Slice()
	if pkt.TransportProtocolNumber != header.TCPProtocolNumber || len(tcp) < header.TCPMinimumSize || header.TCP(tcp).Flags()&both != both {
		return false
	}
	select {
	case h <- pkt.IncRef():
		return true
	default:
		pkt.DecRef()
		return false
	}
}

// Send has send send what was taken, until done is closed. (h never is: a timer of netstack's may send yet.)
func (h Handshakes) Send(done <-chan struct{}, send func(*stack.PacketBuffer)) {
	for {
		select {
		case pkt := <-h:
			send(pkt)
			pkt.DecRef()
		case <-done:
			return
		}
	}
}
