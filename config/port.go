package config

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/usernet/usernet"
)

var errSyntax = errors.New("want [IP:][HOST[-END]:]CONTAINER[/tcp|udp|sctp], an IPv6 address in brackets")

// Port reads one port in the syntax of docker run -p, [ip:][hostPort[-end]:]containerPort[/proto], with an IPv6
// address in brackets. Without a protocol it is TCP, without a host port any free one.
func Port(spec string) (usernet.Port, error) {
	ports, err := Ports(spec)
	if err != nil {
		return usernet.Port{}, err
	}
	if len(ports) != 1 {
		return usernet.Port{}, invalid("port %.64q: it is %d ports, want one", spec, len(ports))
	}
	return ports[0], nil
}

// Ports reads a port as Port does, or a range of them: 8000-8010:9000-9010 is eleven ports. A range on the host's
// side alone, 8000-8010:80, is one port on the first free one of the range.
func Ports(spec string) ([]usernet.Port, error) {
	rest, proto, err := cutProto(spec)
	if err != nil {
		return nil, invalid("port %.64q: %w", spec, err)
	}
	var host span
	hostIP, hostText, contText, err := cutHost(rest)
	if err != nil {
		return nil, invalid("port %.64q: %w", spec, err)
	}
	if hostText != "" {
		if host, err = parseSpan(hostText); err != nil {
			return nil, invalid("port %.64q: %w", spec, err)
		}
	}
	cont, err := parseSpan(contText)
	if err != nil {
		return nil, invalid("port %.64q: %w", spec, err)
	}
	switch {
	case cont.first == 0:
		return nil, invalid("port %.64q: a container has no port 0", spec)
	case host.first == 0 && host.last != 0:
		return nil, invalid("port %.64q: the host has no port 0", spec)
	}
	return expand(spec, usernet.Port{Proto: proto, HostIP: hostIP}, host, cont)
}

func expand(spec string, p usernet.Port, host, cont span) ([]usernet.Port, error) {
	if cont.len() == 1 {
		p.HostPort, p.ContainerPort = uint16(host.first), uint16(cont.first)
		if host.last > host.first {
			p.HostPortEnd = uint16(host.last)
		}
		return []usernet.Port{p}, nil
	}
	if host.first != 0 && host.len() != cont.len() {
		return nil, invalid("port %.64q: %d ports of the host for %d of the container", spec, host.len(), cont.len())
	}
	ports := make([]usernet.Port, cont.len())
	for i := range ports {
		ports[i] = p
		ports[i].ContainerPort = uint16(cont.first + i)
		if host.first != 0 {
			ports[i].HostPort = uint16(host.first + i)
		}
	}
	return ports, nil
}

func cutProto(spec string) (rest string, proto usernet.Proto, err error) {
	rest, name, given := strings.Cut(spec, "/")
	if !given {
		return rest, usernet.TCP, nil
	}
	switch proto = usernet.Proto(strings.ToLower(name)); proto {
	case usernet.TCP, usernet.UDP, usernet.SCTP:
		return rest, proto, nil
	}
	return "", "", fmt.Errorf("protocol %.64q: want tcp, udp or sctp", name)
}

// cutHost splits [ip:][host:]container.
func cutHost(s string) (ip netip.Addr, host, cont string, err error) {
	i := strings.LastIndexByte(s, ':')
	if i < 0 {
		return netip.Addr{}, "", s, nil
	}
	s, cont = s[:i], s[i+1:]
	if i = strings.LastIndexByte(s, ':'); i < 0 {
		return netip.Addr{}, s, cont, nil
	}
	text, host := s[:i], s[i+1:]
	inside, bracket := strings.CutPrefix(text, "[")
	if bracket {
		if text, bracket = strings.CutSuffix(inside, "]"); !bracket {
			return netip.Addr{}, "", "", errSyntax
		}
	}
	if ip, err = hostIP(text); err != nil {
		return netip.Addr{}, "", "", fmt.Errorf("host address %.64q: %w", text, err)
	}
	if bracket != strings.Contains(text, ":") {
		return netip.Addr{}, "", "", errSyntax
	}
	return ip, host, cont, nil
}

// span is a range of ports, both ends included.
type span struct{ first, last int }

func (s span) len() int { return s.last - s.first + 1 }

func parseSpan(s string) (span, error) {
	from, to, ranged := strings.Cut(s, "-")
	first, err := strconv.ParseUint(from, 10, 16)
	if err != nil {
		return span{}, errSyntax
	}
	last := first
	if ranged {
		if last, err = strconv.ParseUint(to, 10, 16); err != nil {
			return span{}, errSyntax
		}
	}
	if last < first {
		return span{}, fmt.Errorf("range %.64s ends before it begins", s)
	}
	return span{int(first), int(last)}, nil
}
