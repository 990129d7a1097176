package gvproxy

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"net/netip"
	"slices"
	"time"

	"github.com/usernet/usernet"
)

// The longest bodies, in bytes. On the host, a zone may have many records.
const (
	maxBody       = 1 << 20
	maxInsideBody = 16 << 10
)

// timeout is how long a request may take to come, and to be done and answered. What it asks for ends a little earlier, so that
// the client hears why.
const (
	timeout = 10 * time.Second
	working = 9 * time.Second
)

// Full is the API of gvproxy -listen: all of it.
func Full(g Gateway, log *slog.Logger) http.Handler {
	mux := services(g, log)
	mux.HandleFunc("/connect", connect(g, log))
	return mux
}

// Services is the API of gvproxy -services: all but /connect, which puts a VM on the network.
func Services(g Gateway, log *slog.Logger) http.Handler { return services(g, log) }

func services(g Gateway, log *slog.Logger) *http.ServeMux {
	mux := http.NewServeMux()
	mux.HandleFunc("/services/forwarder/all", get(func(*http.Request) any { return forwardBodies(g.Forwards()) }))
	mux.HandleFunc("/services/forwarder/expose", post(maxBody, func(r *http.Request, req exposeBody) error {
		return expose(r, g, req, anybody)
	}))
	mux.HandleFunc("/services/forwarder/unexpose", post(maxBody, func(r *http.Request, req unexposeBody) error {
		return unexpose(r.Context(), g, req, netip.Addr{})
	}))
	mux.HandleFunc("/services/dns/all", get(func(*http.Request) any { return zoneBodies(g.Zones()) }))
	mux.HandleFunc("/services/dns/add", post(maxBody, func(_ *http.Request, req zoneBody) error {
		return g.AddZone(zoneValue(req))
	}))
	leases := get(func(*http.Request) any { return leaseBodies(g.Leases()) })
	mux.HandleFunc("/services/dhcp/leases", leases)
	mux.HandleFunc("/leases", leases)
	mux.HandleFunc("/cam", get(func(*http.Request) any { return camBodies(g.CAM()) }))
	mux.HandleFunc("/stats", get(func(*http.Request) any { return statsBody(g.Stats()) }))
	mux.HandleFunc("/tunnel", tunnel(g, log))
	return mux
}

// Inside is the API at port 80 of the gateway's address, for guests. It has the forwarder's paths only. A guest sees, makes and
// ends TCP and UDP forwards to the address that it calls from: with those of unix sockets it could delete and
// read files of the host, with others' it could take over what they serve.
func Inside(f Forwarder) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/services/forwarder/all", get(func(r *http.Request) any {
		addr, err := caller(r)
		return forwardBodies(slices.DeleteFunc(slices.Clone(f.Forwards()), func(fwd Forward) bool {
			return err != nil || !guests(fwd, addr)
		}))
	}))
	mux.HandleFunc("/services/forwarder/expose", post(maxInsideBody, func(r *http.Request, req exposeBody) error {
		return expose(r, f, req, func(fwd Forward) error {
			addr, err := caller(r)
			if err != nil || !guests(fwd, addr) {
				return refusal{http.StatusForbidden, errors.New("a guest can forward tcp and udp to itself only")}
			}
			return nil
		})
	}))
	mux.HandleFunc("/services/forwarder/unexpose", post(maxInsideBody, func(r *http.Request, req unexposeBody) error {
		addr, err := caller(r)
		if k := key(req.Protocol, req.Local); err != nil || k.Proto != TCP && k.Proto != UDP {
			return errNotFound
		}
		return unexpose(r.Context(), f, req, addr)
	}))
	return mux
}

// Debug adds the profiler to an API, as gvproxy -debug does on -listen, at /debug/pprof/.
func Debug(api http.Handler) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/", api)
	mux.HandleFunc("/debug/pprof/", pprof.Index)
	mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	return mux
}

var errNotFound = errors.New("proxy not found")

// anybody is the check of forwards that the host asks for.
func anybody(Forward) error { return nil }

// guests tells whether f is a forward that the guest at addr may have.
func guests(f Forward, addr netip.Addr) bool {
	return (f.Proto == TCP || f.Proto == UDP) && f.Target.Addr() == addr
}

// caller is the address that a guest calls from.
func caller(r *http.Request) (netip.Addr, error) {
	a, err := netip.ParseAddrPort(r.RemoteAddr)
	return plain(a.Addr()), err
}

func expose(r *http.Request, to Forwarder, req exposeBody, allowed func(Forward) error) error {
	k := key(req.Protocol, req.Local)
	remote := req.Remote
	if k.Proto != Unix && k.Proto != NPipe {
		var err error
		if remote, err = complete(remote, r.RemoteAddr); err != nil {
			return refusal{http.StatusBadRequest, err}
		}
	}
	f, err := ParseForward(k.Proto, k.Local, remote)
	if err != nil {
		return err
	}
	if err := allowed(f); err != nil {
		return err
	}
	err = to.Expose(r.Context(), f)
	if errors.Is(err, usernet.ErrExists) {
		return fmt.Errorf("proxy already running for %s on %s", f.Proto, f.Local)
	}
	return err
}

func unexpose(ctx context.Context, from Forwarder, req unexposeBody, to netip.Addr) error {
	err := from.Unexpose(ctx, key(req.Protocol, req.Local), to)
	if errors.Is(err, usernet.ErrNotFound) {
		return errNotFound
	}
	return err
}

// refusal is an error with the status to answer with. Others are answered with 500.
type refusal struct {
	status int
	error
}

// get answers a request of any method with a value. There is no Content-Type: gvproxy's is what net/http takes JSON for.
func get(value func(r *http.Request) any) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		// The values are of our own making; what fails is the connection.
		_ = json.NewEncoder(w).Encode(value(r))
	}
}

// post reads the JSON value that a body begins with, has it done and answers with nothing or with an error's text.
func post[Req any](most int64, do func(r *http.Request, req Req) error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodPost {
			http.Error(w, "post only", http.StatusBadRequest)
			return
		}
		ctx, cancel := context.WithTimeout(r.Context(), working)
		defer cancel()
		var req Req
		if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, most)).Decode(&req); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		if err := do(r.WithContext(ctx), req); err != nil {
			status := http.StatusInternalServerError
			if refused, ok := errors.AsType[refusal](err); ok {
				status = refused.status
			}
			http.Error(w, err.Error(), status)
		}
	}
}

// tunnel makes the client's connection one to ip:port in the network. The client hears OK before that is dialled, as
// from gvproxy; when it cannot be, the connection ends.
func tunnel(s Streams, log *slog.Logger) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		query := r.URL.Query()
		if query.Get("ip") == "" {
			http.Error(w, "ip is mandatory", http.StatusInternalServerError)
			return
		}
		to, err := addrPort(query.Get("ip"), query.Get("port"))
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		conn, early, err := hijack(w)
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		defer conn.Close()
		if err := carry(r.Context(), s, conn, early, to); err != nil && r.Context().Err() == nil {
			log.Warn("tunnel", "to", to, "err", err)
		}
	}
}

// connect makes the client's connection the wire of a VM. There is no answer to the request: frames follow.
func connect(s Streams, log *slog.Logger) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		conn, early, err := hijack(w)
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		defer conn.Close()
		if err := s.Attach(r.Context(), conn, early); err != nil && r.Context().Err() == nil {
			log.Warn("connect", "from", conn.RemoteAddr(), "err", err)
		}
	}
}

// hijack takes the connection of a request over, without deadlines, with what has been read of it behind the request.
func hijack(w http.ResponseWriter) (conn net.Conn, early []byte, err error) {
	conn, buf, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return nil, nil, err
	}
	early, err = buf.Reader.Peek(buf.Reader.Buffered())
	return conn, slices.Clone(early), err
}
