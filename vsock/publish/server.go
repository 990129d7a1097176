package publish

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/usernet/usernet"
)

// ServerConfig is what a Server is made from.
type ServerConfig struct {
	Log *slog.Logger // sessions at info level, refused connections at debug level
	// Holder tells what else of this process has a port, for the error that the guest gets: "a forward of vm1 has it". "": nothing that
	// is known. It is asked before a port is opened, and may be nil.
	Holder func(proto usernet.Proto, at netip.AddrPort) string
	// Guest is what a request's sender is called in logs, lists and errors: "vm1". nil: its RemoteAddr.
	Guest  func(*http.Request) string
	Limits Limits
}

// Limits bound what guests may use. Zero values mean the defaults.
type Limits struct {
	Sessions      int // at a time: 64
	GuestSessions int // of those, of what ServerConfig.Guest calls one guest: 8; without Guest nobody is told apart
	Ports         int // of one session: 4096
	Conns         int // connections and UDP flows of one session at a time: 8192
}

// Server opens ports on the host for guests: for whoever can send it requests, so its handler belongs on listeners that
// only guests reach, and no process that has no business with the host's ports. It needs no privileges, but for ports that do.
type Server struct {
	cfg ServerConfig

	endsOneWay func(net.Conn) bool

	mu       sync.Mutex
	closed   bool
	sessions map[string]*session // by their secret
	joining  map[string]int      // sessions of a guest that are waiting for an older one of theirs to end
	ports    map[slot][]*hostPort
	running  sync.WaitGroup // sessions
}

// slot is a port number of one protocol; every address has one of its own.
type slot struct {
	proto usernet.Proto
	port  uint16
}

// NewServer makes a Server without ports.
func NewServer(cfg ServerConfig) *Server {
	cfg.Limits.Sessions = cmp.Or(cfg.Limits.Sessions, 64)
	cfg.Limits.Ports = cmp.Or(cfg.Limits.Ports, 4096)
	cfg.Limits.Conns = cmp.Or(cfg.Limits.Conns, 8192)
	if cfg.Guest == nil {
		cfg.Guest = remoteAddr
		cfg.Limits.GuestSessions = cfg.Limits.Sessions
	}
	cfg.Limits.GuestSessions = cmp.Or(cfg.Limits.GuestSessions, 8)
	return &Server{cfg: cfg, endsOneWay: endsOneWay, sessions: make(map[string]*session), joining: make(map[string]int), ports: make(map[slot][]*hostPort)}
}

func remoteAddr(r *http.Request) string {
	if a := r.RemoteAddr; a != "" && a != "@" { // as those of unix sockets
		return a
	}
	return "a guest"
}

// Port is one port that is published.
type Port struct {
	Proto    usernet.Proto
	Addr     netip.Addr // zero: all addresses of the host
	Port     uint16
	Guest    string // whose it is
	Since    time.Time
	Accepted uint64 // connections and UDP flows since then, without the refused ones
	Refused  uint64
	Active   int // now
}

// Ports lists what is published, in the order of ports.
func (s *Server) Ports() []Port {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []Port
	for _, ps := range s.ports {
		for _, p := range ps {
			all = append(all, p.status())
		}
	}
	slices.SortFunc(all, func(a, b Port) int {
		return cmp.Or(cmp.Compare(a.Port, b.Port), cmp.Compare(a.Proto, b.Proto), a.Addr.Compare(b.Addr))
	})
	return all
}

// Run serves until ctx is done, and then closes the Server.
func (s *Server) Run(ctx context.Context) error {
	<-ctx.Done()
	return s.Close()
}

// Close ends all sessions with their ports and connections, and returns when they have ended. Requests that come later are
// answered with an error. It may be called again.
func (s *Server) Close() error {
	s.mu.Lock()
	s.closed = true
	for _, x := range s.sessions {
		x.stop()
	}
	s.mu.Unlock()
	s.running.Wait()
	return nil
}

// ServeHTTP answers requests for SessionPath and StreamPath. That of a session it serves until the session's end.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	serve := s.serveStream
	switch {
	case r.URL.Path == SessionPath:
		serve = s.serveSession
	case r.URL.Path != StreamPath:
		http.NotFound(w, r)
		return
	}
	switch {
	case r.Method != http.MethodPost:
		w.Header().Set("Allow", http.MethodPost)
		http.Error(w, "want POST", http.StatusMethodNotAllowed)
	case r.ContentLength != 0:
		http.Error(w, "want a request without a body", http.StatusBadRequest)
	case !isUpgrade(r.Header):
		w.Header().Set("Upgrade", Protocol)
		http.Error(w, "want an upgrade to "+Protocol, http.StatusUpgradeRequired)
	default:
		serve(w, r)
	}
}

// serveStream takes one more stream of a guest's.
func (s *Server) serveStream(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	x := s.sessions[r.Header.Get(secretHeader)]
	s.mu.Unlock()
	if x == nil {
		http.Error(w, "there is no session of this secret", http.StatusForbidden)
		return
	}
	chunks := false
	conn, early, err := hijack(w, func(conn net.Conn) string {
		if chunks = !s.endsOneWay(conn); chunks {
			return chunksHeader + ": 1\r\n"
		}
		return ""
	})
	if err != nil {
		s.cfg.Log.Debug("no stream", "guest", x.guest, "err", err)
		return
	}
	x.pool.put(stream{conn, early, chunks})
}

// serveSession serves a guest until either side ends it.
func (s *Server) serveSession(w http.ResponseWriter, r *http.Request) {
	number := r.Header.Get(guestHeader)
	if !isNumber(number) {
		http.Error(w, "want "+guestHeader+": 32 hexadecimal digits", http.StatusBadRequest)
		return
	}
	x, err := s.begin(number, s.cfg.Guest(r))
	if err != nil {
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	defer s.end(x)
	conn, early, err := hijack(w, func(net.Conn) string { return secretHeader + ": " + x.secret + "\r\n" })
	if err != nil {
		s.cfg.Log.Debug("no session", "guest", x.guest, "err", err)
		return
	}
	log := s.cfg.Log.With("guest", x.guest)
	log.Info("a guest may publish ports")
	err = x.run(newLines(conn, io.MultiReader(bytes.NewReader(early), conn)))
	log.Info("a guest has gone, and so have its ports", "why", err)
}

// begin makes a session. An older one of the same guest ends first, so that its ports are free.
func (s *Server) begin(number, guest string) (*session, error) {
	x := newSession(s, number, guest)
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		if s.closed {
			return nil, errors.New("the gateway is shutting down")
		}
		older := s.ofLocked(number)
		if older == nil {
			break
		}
		if n := s.joining[guest]; n >= s.cfg.Limits.GuestSessions {
			return nil, fmt.Errorf("too many sessions, %d of %s wait for older ones to end", n, guest)
		}
		older.stop()
		s.joining[guest]++
		s.mu.Unlock()
		<-older.ended
		s.mu.Lock()
		if s.joining[guest]--; s.joining[guest] == 0 {
			delete(s.joining, guest)
		}
	}
	if len(s.sessions) >= s.cfg.Limits.Sessions {
		return nil, fmt.Errorf("too many sessions, there are %d", len(s.sessions))
	}
	if n := s.countLocked(guest); n >= s.cfg.Limits.GuestSessions {
		return nil, fmt.Errorf("too many sessions, %s has %d", guest, n)
	}
	s.sessions[x.secret] = x
	s.running.Add(1)
	return x, nil
}

// countLocked counts the sessions of a guest.
func (s *Server) countLocked(guest string) (n int) {
	for _, x := range s.sessions {
		if x.guest == guest {
			n++
		}
	}
	return n
}

func (s *Server) ofLocked(number string) *session {
	for _, x := range s.sessions {
		if x.number == number {
			return x
		}
	}
	return nil
}

// end takes away a session with all that it has.
func (s *Server) end(x *session) {
	x.stop()
	x.close()
	s.mu.Lock()
	delete(s.sessions, x.secret)
	s.mu.Unlock()
	close(x.ended)
	s.running.Done()
}

// holder tells who in this process has a port that would be in the way of one at at; "": nobody.
func (s *Server) holder(proto usernet.Proto, at netip.AddrPort) string {
	s.mu.Lock()
	for _, p := range s.ports[slot{proto, at.Port()}] {
		if p.overlaps(at.Addr()) {
			defer s.mu.Unlock()
			return p.session.guest + " has published it"
		}
	}
	s.mu.Unlock()
	if s.cfg.Holder == nil {
		return ""
	}
	return s.cfg.Holder(proto, at)
}

// add puts a port on the list.
func (s *Server) add(p *hostPort) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := slot{p.proto, p.port}
	s.ports[k] = append(s.ports[k], p)
}

func (s *Server) remove(p *hostPort) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := slot{p.proto, p.port}
	if s.ports[k] = slices.DeleteFunc(s.ports[k], func(o *hostPort) bool { return o == p }); len(s.ports[k]) == 0 {
		delete(s.ports, k)
	}
}

// hijack takes a request's connection, with what came behind the request, and grants the upgrade, with one more field for the answer.
func hijack(w http.ResponseWriter, field func(net.Conn) string) (_ net.Conn, early []byte, err error) {
	conn, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		http.Error(w, "this connection cannot be upgraded", http.StatusInternalServerError)
		return nil, nil, err
	}
	defer func() {
		if err != nil {
			conn.Close()
		}
	}()
	if n := rw.Reader.Buffered(); n > 0 {
		early = make([]byte, n)
		if _, err := io.ReadFull(rw.Reader, early); err != nil {
			return nil, nil, err
		}
	}
	if err := conn.SetDeadline(time.Now().Add(silence)); err != nil {
		return nil, nil, err
	}
	answer := "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: " + Protocol + "\r\n" + field(conn) + "\r\n"
	if _, err := io.WriteString(conn, answer); err != nil {
		return nil, nil, err
	}
	return conn, early, conn.SetDeadline(time.Time{})
}
