package vsock

import (
	"context"
	"errors"
	"fmt"
	"net"

	"github.com/linuxkit/virtsock/pkg/hvsock"
	"golang.org/x/sys/windows/registry"
)

// dialHV leaves a dial behind that ctx has ended: connect(2) of Hyper-V sockets cannot be interrupted, and comes back by
// itself when the machine answers or is gone.
func dialHV(ctx context.Context, a Addr) (net.Conn, error) {
	for _, m := range machines {
		if m.many && m.id == a.vm {
			return nil, errors.New("to dial takes one machine")
		}
	}
	addr, err := a.hyperV()
	if err != nil {
		return nil, err
	}
	type result struct {
		conn net.Conn
		err  error
	}
	done := make(chan result)
	go func() {
		conn, err := hvsock.Dial(addr)
		select {
		case done <- result{conn, err}:
		case <-ctx.Done():
			if err == nil {
				conn.Close()
			}
		}
	}()
	select {
	case r := <-done:
		return r.conn, r.err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

func listenHV(a Addr) (net.Listener, error) {
	addr, err := a.hyperV()
	if err != nil {
		return nil, err
	}
	return hvsock.Listen(addr)
}

func (a Addr) hyperV() (addr hvsock.Addr, err error) {
	if addr.VMID, err = hvsock.GUIDFromString(a.vm.String()); err != nil {
		return addr, fmt.Errorf("machine %s: %w", a.vm, err)
	}
	if addr.ServiceID, err = hvsock.GUIDFromString(a.service.String()); err != nil {
		return addr, fmt.Errorf("service %s: %w", a.service, err)
	}
	return addr, nil
}

// Install writes the entry into this machine's registry, and may be repeated.
func (r Registration) Install() error {
	key, _, err := registry.CreateKey(registry.LOCAL_MACHINE, r.Key(), registry.SET_VALUE)
	if err != nil {
		return fmt.Errorf("register %s: %w", r.Service, err)
	}
	defer key.Close()
	if err := key.SetStringValue(elementName, r.Name); err != nil {
		return fmt.Errorf("register %s: %w", r.Service, err)
	}
	return nil
}

// Remove takes the entry out of this machine's registry; one that is not there is success.
func (r Registration) Remove() error {
	err := registry.DeleteKey(registry.LOCAL_MACHINE, r.Key())
	if err != nil && !errors.Is(err, registry.ErrNotExist) {
		return fmt.Errorf("unregister %s: %w", r.Service, err)
	}
	return nil
}
