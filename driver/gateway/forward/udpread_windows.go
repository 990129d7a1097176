package forward

import (
	"net"
	"sync"

	"golang.org/x/sys/windows"
)

// noFamily are how the system says that it does without a family.
var noFamily = []error{windows.WSAEAFNOSUPPORT, windows.WSAEADDRNOTAVAIL}

// read waits for a datagram and reads it into a batch of the pool, where the caller puts it back.
func (s *socket) read(batches *sync.Pool) (*batch, int, error) {
	b := batches.Get().(*batch)
	m := &b.messages[0]
	n, control, _, from, err := s.ReadMsgUDPAddrPort(m.Buffers[0], m.OOB)
	if err != nil {
		batches.Put(b)
		return nil, 0, err
	}
	m.N, m.NN, m.Addr = n, control, net.UDPAddrFromAddrPort(from)
	return b, 1, nil
}
