package gvproxy

import (
	"context"
	"encoding/json"
	"log/slog"
	"net"
	"time"
)

// Event is what a notification is about.
type Event string

// The events. Those of connections carry the VM's Ethernet address.
const (
	Ready                 Event = "ready" // everything listens
	ConnectionEstablished Event = "connection_established"
	ConnectionClosed      Event = "connection_closed"
	HypervisorError       Event = "hypervisor_error" // a hypervisor's socket cannot be listened on, or failed
)

const (
	maxWaiting    = 100             // notifications
	notifyTimeout = 5 * time.Second // for one
	lastTimeout   = time.Second     // for all that wait at the end
)

// Notifier tells a program what happens to the gateway. The program listens on a unix socket; each notification is a
// connection with one line of JSON on it.
type Notifier struct {
	path    string
	waiting chan notification
	log     *slog.Logger
}

type notification struct {
	Type Event  `json:"notification_type"`
	MAC  string `json:"mac_address,omitempty"`
}

// NewNotifier returns a notifier for the socket at path; "" is nobody to tell.
func NewNotifier(path string, log *slog.Logger) *Notifier {
	return &Notifier{path: path, waiting: make(chan notification, maxWaiting), log: log}
}

// Send leaves a notification for Run to deliver and returns at once. mac is the zero value for events that are not a
// VM's. When 100 are waiting, the notification is lost.
func (n *Notifier) Send(e Event, mac MAC) {
	if n.path == "" {
		return
	}
	msg := notification{Type: e}
	if mac != (MAC{}) {
		msg.MAC = mac.String()
	}
	select {
	case n.waiting <- msg:
	default:
		n.log.Warn("notification lost: too many are waiting", "type", e)
	}
}

// Run delivers notifications, in order, until ctx is done; then, for a second at most, those that wait. What cannot be
// delivered in 5 s is logged and lost.
func (n *Notifier) Run(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			n.last(context.WithoutCancel(ctx))
			return nil
		case msg := <-n.waiting:
			err := n.deliver(ctx, msg)
			switch {
			case err == nil:
			case ctx.Err() != nil:
				n.last(context.WithoutCancel(ctx), msg)
				return nil
			default:
				n.log.Warn("notification lost", "type", msg.Type, "err", err)
			}
		}
	}
}

// last delivers what is left at the end, begun and then what waits: why the gateway ends is among it.
func (n *Notifier) last(ctx context.Context, begun ...notification) {
	ctx, cancel := context.WithTimeout(ctx, lastTimeout)
	defer cancel()
	left := begun
	for len(n.waiting) > 0 { // nobody else receives
		left = append(left, <-n.waiting)
	}
	for _, msg := range left {
		if err := n.deliver(ctx, msg); err != nil {
			n.log.Debug("notification lost", "type", msg.Type, "err", err)
		}
	}
}

func (n *Notifier) deliver(ctx context.Context, msg notification) error {
	ctx, cancel := context.WithTimeout(ctx, notifyTimeout)
	defer cancel()
	conn, err := new(net.Dialer).DialContext(ctx, "unix", n.path)
	if err != nil {
		return err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	return json.NewEncoder(conn).Encode(msg)
}
