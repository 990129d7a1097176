package gateway

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"time"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/driver/gvproxy"
	"github.com/usernet/usernet/usermode/l2"
	"github.com/usernet/usernet/vsock"
	"github.com/usernet/usernet/vsock/publish"
)

// PortsPath is where the API lists what machines have published: with GET, a list of Published.
const PortsPath = "/usernet/ports"

// Published is a port that a machine has published on the host.
type Published struct {
	Proto    usernet.Proto `json:"protocol"`
	Addr     netip.Addr    `json:"address,omitzero"` // zero: all of the host's
	Port     uint16        `json:"port"`
	Guest    string        `json:"guest"` // whose it is
	Since    time.Time     `json:"since"`
	Accepted uint64        `json:"accepted"` // connections and UDP flows since then
	Refused  uint64        `json:"refused"`  // likewise, for want of room
	Active   int           `json:"active"`   // now
}

// insidePort is where guests find the API, at the gateway's address.
const insidePort = 80

// full is the API of Config.Listen.
func (g *Gateway) full() http.Handler {
	api := gvproxy.Full(g, g.log)
	if g.cfg.Profile {
		api = gvproxy.Debug(api)
	}
	mux := http.NewServeMux()
	mux.Handle("/", api)
	mux.HandleFunc("/connect"+l2.UsernetPath, g.connect)
	mux.Handle("/usernet/", g.published)
	mux.HandleFunc("GET "+PortsPath, g.listPublished)
	return mux
}

// services is the API of Config.Services.
func (g *Gateway) services() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/", gvproxy.Services(g, g.log))
	mux.Handle("/usernet/", g.published)
	mux.HandleFunc("GET "+PortsPath, g.listPublished)
	return mux
}

// forMachines is what machines come by: the network, and ports of their own. Who may send requests here is a guest, of which no address
// is known.
func (g *Gateway) forMachines() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/connect", g.connect)
	mux.HandleFunc("/connect"+l2.UsernetPath, g.connect)
	mux.Handle("/usernet/", g.published)
	return mux
}

// inside is what guests find at the gateway's address.
func (g *Gateway) inside() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/", gvproxy.Inside(guests{g}))
	mux.Handle("/usernet/", g.published)
	mux.HandleFunc(publish.StreamPath, func(w http.ResponseWriter, r *http.Request) { g.published.ServeHTTP(uncounted{w}, r) })
	return mux
}

// uncounted is for a request that may take its connection over: it then counts no longer as one of the few that a guest may have to
// the API. Streams of published ports have package publish's limits.
type uncounted struct{ http.ResponseWriter }

// Hijack implements http.Hijacker.
func (w uncounted) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, rw, err := http.NewResponseController(w.ResponseWriter).Hijack()
	if c, ok := conn.(interface{ Uncount() }); ok { // a *vmnet.Conn
		c.Uncount()
	}
	return conn, rw, err
}

func (g *Gateway) listPublished(w http.ResponseWriter, _ *http.Request) {
	list := []Published{}
	for _, p := range g.published.Ports() {
		list = append(list, Published(p))
	}
	_ = json.NewEncoder(w).Encode(list) // what fails is the connection
}

// doors returns what listens for HTTP on the host.
func (g *Gateway) doors() (open []func() (service, error)) {
	for _, a := range g.cfg.Listen {
		open = append(open, func() (service, error) {
			return g.door(a, func(l net.Listener) http.Handler {
				if machinesOnly(a, l) {
					return g.forMachines()
				}
				return g.full()
			})
		})
	}
	for _, a := range g.cfg.Machines {
		open = append(open, func() (service, error) {
			return g.door(a, func(net.Listener) http.Handler { return g.forMachines() })
		})
	}
	for _, a := range g.cfg.Services {
		open = append(open, func() (service, error) {
			return g.door(a, func(net.Listener) http.Handler { return g.services() })
		})
	}
	return open
}

func (g *Gateway) door(a vsock.Addr, handler func(net.Listener) http.Handler) (service, error) {
	l, err := vsock.Listen(a)
	if err != nil {
		return service{}, err
	}
	g.log.Debug("listening", "at", a)
	return g.http(l, handler(l)), nil
}

// machinesOnly tells whether it is machines that call at an address: by what only hypervisors have. What is behind a socket
// that systemd has passed shows when it is there.
func machinesOnly(a vsock.Addr, l net.Listener) bool {
	switch a.Scheme() {
	case "vsock", "hybrid", "hyperkit", "hvsock":
		return true
	}
	return l.Addr().Network() == "vsock"
}

// serveInside listens at the gateway's address in the network.
func (g *Gateway) serveInside() (service, error) {
	l, err := g.net.ListenTCP(insidePort)
	if err != nil {
		return service{}, fmt.Errorf("listen in the network: %w", err)
	}
	return g.http(l, g.inside()), nil
}

func (g *Gateway) http(l net.Listener, h http.Handler) service {
	return service{
		run:   func(ctx context.Context) error { return gvproxy.Serve(ctx, l, h, g.log) },
		close: l.Close,
	}
}

// guestName is what the sender of a request is called: its address, or the socket that it came by where senders have no address of
// their own.
func guestName(r *http.Request) string {
	if a, err := netip.ParseAddrPort(r.RemoteAddr); err == nil {
		return a.Addr().Unmap().String()
	}
	if r.RemoteAddr != "" && r.RemoteAddr != "@" {
		host, _, err := net.SplitHostPort(r.RemoteAddr) // vm(3):49152
		if err == nil {
			return host
		}
		return r.RemoteAddr
	}
	if a, ok := r.Context().Value(http.LocalAddrContextKey).(net.Addr); ok {
		return a.String()
	}
	return "unknown"
}
