package tcprelay

import (
	"fmt"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// Buffer is how large each of the two buffers of a TCP connection is, as long as there are few connections. A client's end is in this
// machine, a few dozen microseconds away: what is in flight on the way to it fits a megabyte many times over, what does not is a queue
// before its link, and where its peer is far away, the host's socket has the window for that. The limits are for an end that is itself behind a long way, such as
// a virtual machine's. Half of a receive buffer is offered as window, so both carry 640 Mbit/s over 100 ms.
const (
	Buffer     = 2 << 20
	receiveMax = 16 << 20
	sendMax    = 8 << 20
	bufferMin  = 64 << 10 // what is left of Buffer with very many connections
)

// setOptions sets what TCP does differently from netstack's defaults, and what must not change with them.
func setOptions(st *stack.Stack) error {
	var (
		// Retransmit what was lost and not the whole window.
		sack = tcpip.TCPSACKEnabled(true)
		// Not RACK, which takes a segment for lost when one that was sent a quarter of a round trip later has arrived
		// (RFC 8985, 6.2). That is microseconds here, and packets overtake each other when the goroutine that writes
		// them moves to another processor: eight streams lost half their speed to retransmissions of what had only
		// been late. A third duplicate acknowledgement (RFC 6675) has not been seen without a loss.
		recovery = tcpip.TCPRecovery(0)
		// The window grows with what the host's socket really takes.
		moderate = tcpip.TCPModerateReceiveBufferOption(true)
		// There is no network between a client and us in which an old segment could survive: a second is plenty for an
		// acknowledgement that was lost. See Opens. (TCPTimeWaitReuseOption is about ports that netstack dials from.)
		timeWait = tcpip.TCPTimeWaitTimeoutOption(time.Second)
		// We have closed and the client never does: give up when Linux does (tcp_fin_timeout).
		linger = tcpip.TCPLingerTimeoutOption(60 * time.Second)
	)
	for _, o := range []tcpip.SettableTransportProtocolOption{&sack, &recovery, &moderate, &timeWait, &linger} {
		if err := st.SetTransportProtocolOption(tcp.ProtocolNumber, o); err != nil {
			return fmt.Errorf("netstack: set %T: %s", o, err)
		}
	}
	return setBuffers(st, 0)
}

// setBuffers sets the limits of buffers, with the receiving ones halved as many times as level says. Those for
// sending leave nothing to tune for netstack: see relay.resize.
func setBuffers(st *stack.Stack, level int) error {
	receive := tcpip.TCPReceiveBufferSizeRangeOption{Min: tcp.MinBufferSize, Default: halved(Buffer, level), Max: receiveMax >> level}
	send := tcpip.TCPSendBufferSizeRangeOption{Min: tcp.MinBufferSize, Default: Buffer, Max: Buffer}
	for _, o := range []tcpip.SettableTransportProtocolOption{&receive, &send} {
		if err := st.SetTransportProtocolOption(tcp.ProtocolNumber, o); err != nil {
			return fmt.Errorf("netstack: set %T: %s", o, err)
		}
	}
	return nil
}

// halved is how large a new connection's buffer is that would be of size if there were few connections.
func halved(size, level int) int { return max(size>>level, bufferMin) }
