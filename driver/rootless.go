package driver

import (
	"fmt"
	"net/netip"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/config"
)

// check tells what is wrong with a network.
func (d *Driver) check(n usernet.Network) error {
	if d.cfg.Rootless && n.Options.Mode == usernet.Bridge {
		return fmt.Errorf("%w option mode=%s: it changes the host's network, which takes root", usernet.ErrInvalid, usernet.Bridge)
	}
	return config.Network(n)
}

// hostAlias is usermode.Config.Host: rootless Podman writes the alias into /etc/hosts of every container, whoever drives
// its networks.
func (d *Driver) hostAlias() func() netip.Addr {
	if !d.cfg.Rootless {
		return nil
	}
	return func() netip.Addr {
		ans, _ := hostNames{d.blocked}.Lookup("host.containers.internal.")
		for _, a := range ans.Addrs {
			if a.Is4() {
				return a
			}
		}
		return netip.Addr{}
	}
}

// Idle tells whether no container is on any network, having looked after those that may have gone.
func (d *Driver) Idle() bool {
	for _, n := range d.all() {
		n.mu.Lock()
		n.sweepLocked()
		busy := len(n.containers) > 0
		n.mu.Unlock()
		if busy {
			return false
		}
	}
	return true
}
