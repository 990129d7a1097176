package tcprelay

import (
	"fmt"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
)

// Link is a stack's way to its clients. It is called in place of a queueing discipline: netstack's own, which queues nothing, makes a list
// for each packet.
type Link interface {
	stack.LinkEndpoint
	stack.QueueingDiscipline
}

// NewStack makes a netstack with one NIC, nic, that takes every packet which comes by link for its own. It has IPv4, IPv6 and the further
// protocols; routes and addresses are the caller's to add. It starts goroutines; Close and Wait end them.
func NewStack(nic tcpip.NICID, link Link, further ...stack.NetworkProtocolFactory) (_ *stack.Stack, err error) {
	st := stack.New(stack.Options{
		// No router solicitations, autoconfiguration, duplicate address detection, IGMP or MLD: the zero options leave all of it
		// off. Nobody on a TUN speaks them. On a switch, which sends groups' frames to everybody, the gateway is the router and has
		// its addresses by definition.
		NetworkProtocols:   append([]stack.NetworkProtocolFactory{ipv4.NewProtocol, ipv6.NewProtocol}, further...),
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4, icmp.NewProtocol6},
		// A packet that is addressed to where it came from is for the host, too.
		HandleLocal: false,
	})
	defer func() {
		if err != nil {
			st.Close()
			st.Wait()
		}
	}()
	if err := setOptions(st); err != nil {
		return nil, err
	}
	if err := st.CreateNICWithOptions(nic, link, stack.NICOptions{QDisc: link}); err != nil {
		return nil, fmt.Errorf("netstack: create NIC: %s", err)
	}
	// Accept packets for any address, and answer in its name.
	if err := st.SetPromiscuousMode(nic, true); err != nil {
		return nil, fmt.Errorf("netstack: promiscuous mode: %s", err)
	}
	if err := st.SetSpoofing(nic, true); err != nil {
		return nil, fmt.Errorf("netstack: spoofing: %s", err)
	}
	return st, nil
}
