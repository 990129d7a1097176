// Package icmperror is the ICMP errors that a gateway tells its guests: its own, those that the host's kernel has queued for a
// socket, and how many of them a guest may get. It makes no packets: each gateway has its way of that.
package icmperror

import "net/netip"

// Numbers of ICMP (RFC 792, RFC 1191, RFC 1812) and ICMPv6 (RFC 4443).
const (
	unreachable4, timeExceeded4, paramProblem4          = 3, 11, 12
	hostUnreachable4, portUnreachable4, needFragment4   = 1, 3, 4
	prohibited4                                         = 13
	unreachable6, tooBig6, timeExceeded6, paramProblem6 = 1, 2, 3, 4
	prohibited6, addressUnreachable6, portUnreachable6  = 1, 3, 4
)

// Message is an ICMP error message without what it quotes.
type Message struct {
	From       netip.Addr // who says so; invalid: the destination itself
	Type, Code uint8
	MTU        uint32 // of "fragmentation needed" and "packet too big"
}

// PortUnreachable is what a host answers where nobody listens.
func PortUnreachable(v4 bool) Message {
	if v4 {
		return Message{Type: unreachable4, Code: portUnreachable4}
	}
	return Message{Type: unreachable6, Code: portUnreachable6}
}

// Prohibited is what a router's filter answers (RFC 1812, section 5.2.7.1).
func Prohibited(v4 bool) Message {
	if v4 {
		return Message{Type: unreachable4, Code: prohibited4}
	}
	return Message{Type: unreachable6, Code: prohibited6}
}

// HostUnreachable is what a router answers that knows no way on.
func HostUnreachable(v4 bool) Message {
	if v4 {
		return Message{Type: unreachable4, Code: hostUnreachable4}
	}
	return Message{Type: unreachable6, Code: addressUnreachable6}
}

// TooBig is RFC 1191, section 4, and RFC 8201.
func TooBig(v4 bool, mtu uint32) Message {
	if v4 {
		return Message{Type: unreachable4, Code: needFragment4, MTU: mtu}
	}
	return Message{Type: tooBig6, MTU: mtu}
}

// IsTooBig tells of a message of either version whether it has an MTU.
func (m Message) IsTooBig(v4 bool) bool {
	if v4 {
		return m.Type == unreachable4 && m.Code == needFragment4
	}
	return m.Type == tooBig6
}

// Passes tells whether a message of this type is for the sender of the packet that it quotes. Redirects are for the host;
// source quench is abolished (RFC 6633).
func Passes(v4 bool, kind uint8) bool {
	if v4 {
		return kind == unreachable4 || kind == timeExceeded4 || kind == paramProblem4
	}
	return kind == unreachable6 || kind == tooBig6 || kind == timeExceeded6 || kind == paramProblem6
}
