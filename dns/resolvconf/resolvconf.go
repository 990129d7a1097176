// Package resolvconf follows the file that tells a host's programs their DNS resolvers, resolv.conf(5).
package resolvconf

import (
	"net/netip"
	"slices"
	"strings"
)

// Path is where the file is.
const Path = "/etc/resolv.conf"

const (
	// maxServers is how many resolvers count; the C libraries take three.
	maxServers = 8
	// maxSearch is how many search domains count.
	maxSearch = 32
	port      = 53
)

// Config is what the file says, as far as it concerns a resolver that stands between the host's and others. The
// options are about programs on the host and do not count.
type Config struct {
	Servers []netip.AddrPort // the preferred one first
	Search  []string         // the domains that an unqualified name is tried in
}

// Parse reads the text of the file. What it does not understand it passes over, as the C libraries do.
func Parse(text []byte) Config {
	var c Config
	for line := range strings.Lines(string(text)) {
		line, _, _ = strings.Cut(line, "#")
		line, _, _ = strings.Cut(line, ";")
		fields := strings.Fields(line)
		if len(fields) < 2 {
			continue
		}
		switch fields[0] {
		case "nameserver":
			a, err := netip.ParseAddr(fields[1])
			if err != nil || a.IsMulticast() || len(c.Servers) == maxServers {
				continue
			}
			s := netip.AddrPortFrom(meant(a.Unmap()), port)
			if !slices.Contains(c.Servers, s) {
				c.Servers = append(c.Servers, s)
			}
		case "domain": // the last of domain and search wins
			c.Search = fields[1:2]
		case "search":
			c.Search = fields[1:min(len(fields), 1+maxSearch)]
		}
	}
	c.Search = slices.DeleteFunc(slices.Clone(c.Search), func(d string) bool { return d == "." })
	return c
}

// meant is the address that a program reaches when it sends to a: the unspecified address means the host itself.
func meant(a netip.Addr) netip.Addr {
	switch a {
	case netip.IPv4Unspecified():
		return netip.AddrFrom4([4]byte{127, 0, 0, 1})
	case netip.IPv6Unspecified():
		return netip.IPv6Loopback()
	}
	return a
}
