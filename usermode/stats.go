package usermode

// Stats is what a gateway carries at the moment, and what it has turned away since Run began.
type Stats struct {
	Conns   int   // TCP connections out of the network
	Pending int   // TCP connections that are being made
	Flows   int64 // UDP flows out of the network

	Refused uint64 // TCP connections beyond a limit, reset
	Ignored uint64 // SYNs beyond the limit of connections that are being made; their senders repeat them
	Evicted uint64 // UDP flows that made room for others
	Dropped uint64 // datagrams from containers: broken, or not taken by the host
	Lost    uint64 // packets to containers that the TUN did not take
}

// Stats may be called at any time. It is zero on an internal network.
func (g *Gateway) Stats() Stats {
	if g.netstack == nil {
		return Stats{}
	}
	n := g.netstack.stats()
	s := Stats{
		Conns: n.Conns, Pending: n.Pending, Flows: n.UDP.Flows,
		Refused: n.Refused, Ignored: n.Ignored, Evicted: n.UDP.Evicted, Dropped: n.UDP.Dropped, Lost: n.Lost + n.UDP.Lost,
	}
	if g.fast == nil {
		return s
	}
	made, refused := g.fast.made.Counts()
	pending, ignored := g.fast.pending.Counts()
	s.Conns += made - pending // which count as made from the beginning
	s.Pending += pending
	s.Refused += refused
	s.Ignored += ignored
	return s
}
