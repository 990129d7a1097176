// Package ocihook is the door for bare OCI runtimes, runc and crun, and for engines that run their hooks: a process for each
// moment of a container's life, with the container's state on its standard input (OCI runtime specification, config.md,
// POSIX-platform Hooks). What the container wants stands in its annotations. The package turns this into calls of the daemon, which it
// starts when there is none.
//
// A container is known by its ID and its bundle: at the end its process and its namespace are gone.
package ocihook

import (
	"context"
	"errors"
	"io"
	"os"

	"github.com/usernet/usernet/driver/control"
)

// Hook is one run of the hook.
type Hook struct {
	Daemon   control.Daemon
	Settings map[string]string // of every container, by their names; its annotations say otherwise
	RunDir   string            // for files, which do not outlive a boot
	Stdin    io.Reader
}

// Run does what the container's state asks for: a container that is being made, or runs, gets its network if it does not have
// it; one that has stopped gives up what it has.
func (h *Hook) Run(ctx context.Context) error {
	st, err := decodeState(h.Stdin)
	if err != nil {
		return err
	}
	if st.ended() {
		return h.release(ctx, st)
	}
	s, err := settingsOf(h.Settings, st.Annotations)
	if err != nil {
		return err
	}
	b, err := st.bundle()
	if err != nil {
		return err
	}
	w, err := s.wish(st, b)
	if err != nil {
		return err
	}
	_, err = h.attach(ctx, st, b, w)
	return err
}

// attach puts the container on its network. It returns what the container has there, or nothing if it had that already or
// shares what another container has.
func (h *Hook) attach(ctx context.Context, st state, b bundle, w wish) (got control.Attached, err error) {
	ns, err := st.namespace()
	if err != nil {
		return got, err
	}
	defer ns.Close()
	err = h.Daemon.Ask(ctx, func(c *control.Client) error {
		there, err := c.NetworksIn(ctx, ns)
		if err != nil || has(there, w.ID) {
			return err // a hook of another stage was here, or the engine was started anew (containerd runs createRuntime then)
		}
		if n, e, shared := sharedWith(there, st, w); shared {
			return h.share(ctx, c, st, b, w, n, e)
		}
		if got, err = c.Attach(ctx, w.AttachRequest, ns); err != nil {
			return err
		}
		if err := h.resolver(st, b, w, got); err != nil {
			return errors.Join(err, c.Detach(context.WithoutCancel(ctx), w.Network.ID, w.ID, ns))
		}
		return nil
	})
	return got, err
}

func has(list []control.Network, endpointID string) bool {
	for _, n := range list {
		for _, e := range n.Endpoints {
			if e.ID == endpointID {
				return true
			}
		}
	}
	return false
}

// release takes all away that the container has on our networks. It succeeds when there is nothing.
func (h *Hook) release(ctx context.Context, st state) error {
	// A namespace that the container joined may outlive it.
	ns := st.joinedNamespace()
	if ns != nil {
		defer ns.Close()
	}
	return h.Daemon.Ask(ctx, func(c *control.Client) error {
		all, err := c.Networks(ctx)
		if err != nil {
			return err
		}
		errs := []error{h.unshare(ctx, c, st, all)}
		for _, n := range all {
			for _, e := range n.Endpoints {
				if isOurs(n) && isOf(st, e) {
					errs = append(errs, c.Detach(ctx, n.ID, e.ID, ns))
				}
			}
		}
		return errors.Join(errs...)
	})
}

// joinedNamespace opens the network namespace that the container has joined; nil: it had one of its own, or that is gone.
func (s state) joinedNamespace() *os.File {
	b, err := s.bundle()
	if err != nil || b.joined() == "" {
		return nil
	}
	f, err := os.Open(b.joined())
	if err != nil {
		return nil
	}
	return f
}
