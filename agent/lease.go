package agent

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"time"
)

// lease is an address that a DHCP server has given for a time, RFC 2131.
type lease struct {
	settings
	server netip.Addr
	began  time.Time // when it was asked for
	// How long after began to ask the server, and then anybody, for more time, and when it ends; expires 0: never.
	renew, rebind, expires time.Duration

	state any // of the server's
}

// errRefused says that the server does not let the machine have the address any longer.
var errRefused = errors.New("address refused")

// server is DHCP on the wire. Each call takes some seconds at most if there is no answer.
type server interface {
	// acquire asks for an address, if possible this one.
	acquire(ctx context.Context, was netip.Addr) (lease, error)
	// extend asks for more time: who has given the lease, or with anybody, whoever listens. The error wraps errRefused if there is none to be had.
	extend(ctx context.Context, l lease, anybody bool) (lease, error)
}

// client keeps an address, RFC 2131, section 4.4.
type client struct {
	server server
	set    func(settings) error
	was    netip.Addr // the address that the TAP has, if any
	log    *slog.Logger
}

// Waits of RFC 2131, section 4.4.5: while nobody answers, half of the time that is left, but not less than a minute; and a bound
// below for servers that give leases of seconds.
const (
	minAgain    = time.Minute
	minLifetime = 2 * time.Second
)

// run ends with ctx. The last settings stay: they are of use again when the gateway comes back.
func (c *client) run(ctx context.Context) {
	for wait := time.Second; ctx.Err() == nil; {
		l, err := c.server.acquire(ctx, c.was)
		if err == nil {
			err = c.set(l.settings)
		}
		if err == nil {
			c.log.Info("address", "settings", l.settings, "server", l.server, "for", l.expires)
			wait = time.Second
			c.was = l.addr.Addr()
			err = c.keep(ctx, l)
		}
		if ctx.Err() != nil {
			return
		}
		c.log.Warn("no address", "error", err)
		sleep(ctx, wait)
		wait = min(2*wait, minAgain)
	}
}

// errExpired says that nobody has given a lease more time.
var errExpired = errors.New("lease has expired")

// keep extends the lease until ctx ends, or until it is lost: then the settings are gone.
func (c *client) keep(ctx context.Context, l lease) error {
	if l.expires == 0 {
		<-ctx.Done()
		return ctx.Err()
	}
	for at := l.renew; ; {
		sleep(ctx, time.Until(l.began.Add(at)))
		if ctx.Err() != nil {
			return ctx.Err()
		}
		since := time.Since(l.began)
		if since >= l.expires {
			return errors.Join(errExpired, c.set(settings{}))
		}
		next, err := c.server.extend(ctx, l, since >= l.rebind)
		switch {
		case err == nil:
			if err := c.set(next.settings); err != nil {
				return err
			}
			l, at = next, next.renew
			continue
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, errRefused):
			return errors.Join(err, c.set(settings{}))
		}
		c.log.Warn("lease is not extended", "error", err)
		at = l.again(time.Since(l.began))
	}
}

// again is when to ask the next time, having got no answer up to now.
func (l lease) again(now time.Duration) time.Duration {
	until := l.expires
	if now < l.rebind {
		until = l.rebind
	}
	return min(now+max((until-now)/2, minAgain), until)
}

// sleep waits for d or for the end of ctx.
func sleep(ctx context.Context, d time.Duration) {
	if d <= 0 {
		return
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}
