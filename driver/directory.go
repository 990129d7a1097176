package driver

import (
	"net"
	"net/netip"
	"slices"
	"sync"

	"github.com/usernet/usernet/dns"
)

// directory tells on which further networks a container is: the C library of most asks the first server only, and
// believes it.
type directory struct {
	mu      sync.RWMutex
	clients map[client]string   // the container's ID
	on      map[string][]client // where it is, by its ID
}

// client is an address on one network.
type client struct {
	names *names
	addr  netip.Addr
}

func (d *directory) enter(s *names, id string, addrs []netip.Addr) {
	if id == "" {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.clients == nil {
		d.clients, d.on = map[client]string{}, map[string][]client{}
	}
	for _, a := range addrs {
		c := client{s, a}
		d.leaveLocked(c)
		d.clients[c] = id
		d.on[id] = append(d.on[id], c)
	}
}

func (d *directory) leave(s *names, a netip.Addr) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.leaveLocked(client{s, a})
}

func (d *directory) leaveLocked(c client) {
	id, ok := d.clients[c]
	if !ok {
		return
	}
	delete(d.clients, c)
	if d.on[id] = slices.DeleteFunc(d.on[id], func(o client) bool { return o == c }); len(d.on[id]) == 0 {
		delete(d.on, id)
	}
}

// forget takes a whole network out.
func (d *directory) forget(s *names) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for c := range d.clients {
		if c.names == s {
			d.leaveLocked(c)
		}
	}
}

// others are the resolvers of the networks that the container with the address a on s is on as well.
func (d *directory) others(s *names, a netip.Addr) []*dns.Resolver {
	d.mu.RLock()
	defer d.mu.RUnlock()
	var rs []*dns.Resolver
	for _, c := range d.on[d.clients[client{s, a}]] {
		if c.names != s && !slices.Contains(rs, c.names.resolver) {
			rs = append(rs, c.names.resolver)
		}
	}
	return rs
}

// hostNames answers the names of the host with its first address of each family that containers reach it at. Podman
// writes the same one into a container's /etc/hosts.
type hostNames struct {
	blocked func(netip.Addr) bool
}

// Lookup implements dns.Source.
func (h hostNames) Lookup(name string) (dns.Answer, bool) {
	if name != "host.containers.internal." && name != "host.docker.internal." {
		return dns.Answer{}, false
	}
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return dns.Answer{}, true
	}
	var ans dns.Answer
	for _, x := range addrs {
		n, ok := x.(*net.IPNet)
		if !ok || !n.IP.IsGlobalUnicast() {
			continue
		}
		a, _ := netip.AddrFromSlice(n.IP)
		a = a.Unmap()
		if !h.blocked(a) && !slices.ContainsFunc(ans.Addrs, func(b netip.Addr) bool { return b.Is4() == a.Is4() }) {
			ans.Addrs = append(ans.Addrs, a)
		}
	}
	return ans, true
}
