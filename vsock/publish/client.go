package publish

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/vsock/proxy"
)

// ClientConfig is what a Client is made from.
type ClientConfig struct {
	Dial func(ctx context.Context) (net.Conn, error) // connects to the host's gateway
	Name string                                      // the gateway, in logs and errors: its URL
	Log  *slog.Logger
	// Streams is how many stand by while anything is published; 0 means 8.
	Streams int
}

// Handler takes over a stream on which the host carries one of its clients; behind the header it is raw. With h.Datagram it
// carries datagrams, see ReadDatagram. It must not wait for anything.
type Handler func(h proxy.Header, conn net.Conn)

const (
	waitForGateway = 4 * time.Second        // how long Publish waits for a session
	answerWithin   = 10 * time.Second       // a host that does not answer a question in time is gone
	dialWithin     = 5 * time.Second        // a connection, upgrade included
	retryEvery     = 10 * time.Second       // ports that could not be had
	shortestWait   = 100 * time.Millisecond // between two attempts to connect
	longestWait    = 5 * time.Second
)

// Client publishes ports on the host of the virtual machine that it runs in. Its methods may be called before Run, and by
// any number of goroutines.
type Client struct {
	cfg    ClientConfig
	number string
	retry  time.Duration

	mu      sync.Mutex
	ports   []*Published
	link    *link         // nil: there is no session
	err     error         // why
	changed chan struct{} // closed when link or err changes
	want    context.Context
	unwant  context.CancelFunc // ends want, which is done while nothing is published
	wanted  chan struct{}      // closed when want begins
}

// NewClient makes a Client. It connects when Run is called.
func NewClient(cfg ClientConfig) *Client {
	cfg.Streams = cmp.Or(cfg.Streams, 8)
	c := &Client{cfg: cfg, number: newNumber(), retry: retryEvery, err: errors.New("not connected yet"), changed: make(chan struct{}), wanted: make(chan struct{})}
	c.want, c.unwant = context.WithCancel(context.Background())
	c.unwant()
	return c
}

// Published is a port that is wanted on the host, from Publish or Keep until Close.
type Published struct {
	client *Client
	handle Handler
	wish   message // with the port that was chosen, once it was had

	mu     sync.Mutex // held over a question to the host
	on     *link      // the session that has it; nil: none
	closed bool

	state sync.Mutex
	err   error // why it is not had
}

var errPending = errors.New("not published yet")

// Publish has the host listen for p, as Docker means it: HostIP zero is all addresses, HostPort 0 any free port, HostPortEnd the end
// of a range. It returns when the host does so, or with its reason why not, which wraps usernet.ErrPortTaken if somebody else has
// the port. Where there is no session it waits a few seconds for one. From then on the port is kept, as with Keep.
func (c *Client) Publish(ctx context.Context, p usernet.Port, handle Handler) (*Published, error) {
	ctx, cancel := context.WithTimeout(ctx, waitForGateway)
	defer cancel()
	w := c.newPublished(p, handle)
	for {
		l, err := c.current(ctx)
		if err == nil {
			err = w.ask(l)
		}
		switch {
		case err == nil:
			return w, nil
		case errors.Is(err, ErrClosed) && ctx.Err() == nil:
			continue // the session ended while it was asked: perhaps the next one answers
		}
		w.Close()
		return nil, err
	}
}

// Keep has the host listen for p as soon as it can and for as long as it can: it does not wait. What the host refuses is tried
// again from time to time, and after either side has restarted.
func (c *Client) Keep(p usernet.Port, handle Handler) *Published {
	w := c.newPublished(p, handle)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.link != nil {
		c.link.recheck()
	}
	return w
}

func (c *Client) newPublished(p usernet.Port, handle Handler) *Published {
	w := &Published{client: c, handle: handle, err: errPending}
	w.wish = message{Op: opPublish, Proto: p.Proto, Addr: p.HostIP, Port: p.HostPort}
	if !p.HostIP.IsValid() && p.IPv4Only {
		w.wish.Addr = netip.IPv4Unspecified()
	}
	if p.HostPortEnd > p.HostPort {
		w.wish.End = p.HostPortEnd
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.ports) == 0 {
		c.want, c.unwant = context.WithCancel(context.Background())
		close(c.wanted)
	}
	c.ports = append(c.ports, w)
	return w
}

// HostPort is the host's port; 0 if it was to be chosen and has not been.
func (w *Published) HostPort() uint16 {
	w.state.Lock()
	defer w.state.Unlock()
	return w.wish.Port
}

// Err is nil while the host listens, and otherwise why it does not.
func (w *Published) Err() error {
	w.state.Lock()
	err := w.err
	w.state.Unlock()
	if err == errPending || errors.Is(err, ErrClosed) {
		// More is known of the session.
		if gone := w.client.Err(); gone != nil {
			return gone
		}
	}
	return err
}

func (w *Published) set(err error) {
	w.state.Lock()
	defer w.state.Unlock()
	w.err = err
}

// Close has the host stop listening. It waits until it has, or until the session is gone, which comes to the same. It may be
// called again.
func (w *Published) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return nil
	}
	w.closed = true
	c := w.client
	c.mu.Lock()
	c.ports = slices.DeleteFunc(c.ports, func(o *Published) bool { return o == w })
	if len(c.ports) == 0 {
		c.unwant()
		c.wanted = make(chan struct{})
	}
	c.mu.Unlock()
	w.set(ErrClosed)
	if w.on != nil {
		w.on.ask(message{Op: opUnpublish, Proto: w.wish.Proto, Addr: w.wish.Addr, Port: w.wish.Port})
	}
	return nil
}

// ask asks the host for the port on a session, unless it has it there already.
func (w *Published) ask(l *link) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed || w.on == l {
		return nil
	}
	a, err := l.ask(w.wish)
	if err == nil {
		w.on = l
		w.state.Lock()
		w.wish.Port, w.wish.End = a.Port, 0
		w.state.Unlock()
	}
	w.set(err)
	return err
}

// lost notes that a session is gone with the port on it.
func (w *Published) lost(l *link) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.on == l {
		w.on = nil
		w.set(ErrClosed)
	}
}

// Err is nil while there is a session with the host, and otherwise tells why there is none.
func (c *Client) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.errLocked()
}

func (c *Client) errLocked() error {
	if c.link != nil {
		return nil
	}
	return fmt.Errorf("host gateway %s: %w", c.cfg.Name, c.err)
}

// current is the session, which may have to be waited for.
func (c *Client) current(ctx context.Context) (*link, error) {
	for {
		c.mu.Lock()
		l, changed, err := c.link, c.changed, c.errLocked()
		c.mu.Unlock()
		if l != nil {
			return l, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, err
		}
	}
}

// set changes the session, or why there is none.
func (c *Client) set(l *link, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.link, c.err = l, err
	close(c.changed)
	c.changed = make(chan struct{})
}

// all are the ports that are wanted now.
func (c *Client) all() []*Published {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.ports)
}

// find is the port that a stream is for: one at the address that was dialled, or else one at all addresses.
func (c *Client) find(h proxy.Header) *Published {
	proto := usernet.TCP
	if h.Datagram {
		proto = usernet.UDP
	}
	at := h.Target.Addr()
	var found *Published
	for _, w := range c.all() {
		w.state.Lock()
		wish, had := w.wish, w.err == nil
		w.state.Unlock()
		if !had || wish.Proto != proto || wish.Port != h.Target.Port() {
			continue
		}
		switch {
		case wish.Addr.WithZone("") == at:
			return w
		case !wish.Addr.IsValid(), wish.Addr.IsUnspecified() && wish.Addr.Is4() == at.Is4():
			found = w
		}
	}
	return found
}

// settle waits until no question about a port is open.
func (c *Client) settle() {
	for _, w := range c.all() {
		w.mu.Lock()
		//lint:ignore SA2001 it is the waiting that matters
		w.mu.Unlock()
	}
}

// Run keeps a session with the host, and what is published on it, until ctx is done. The host's ports are closed then; streams
// that were handed over are not Run's any more.
func (c *Client) Run(ctx context.Context) error {
	wait := shortestWait
	told := ""
	for ctx.Err() == nil {
		stood, err := c.session(ctx)
		if ctx.Err() != nil {
			break
		}
		if stood {
			wait, told = shortestWait, ""
		}
		if text := err.Error(); text != told {
			c.cfg.Log.Warn("there is no host gateway", "gateway", c.cfg.Name, "err", err)
			told = text
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
		}
		wait = min(2*wait, longestWait)
	}
	c.set(nil, ErrClosed)
	return nil
}
