package firewall

import (
	"bytes"
	"fmt"
	"os"

	"github.com/coreos/go-iptables/iptables"
)

// EnableForwarding turns on the kernel's IPv4 forwarding, and with v6 also IPv6 forwarding; networks of mode bridge are
// routed. Where it is off, the policy of filter FORWARD becomes DROP first, as Docker does it, so that the machine does
// not become a router for everybody; a rule of the administrator's can still let more through. It is never
// turned off again, because others may have come to need it.
//
// With IPv6 forwarding on, an interface whose accept_ra is 1 (the default) no longer accepts router advertisements:
// a host that learns its default route or its address from them loses it when it expires. Such a host needs
// net.ipv6.conf.IFACE.accept_ra=2, or a manager that handles advertisements itself (systemd-networkd, NetworkManager).
// (Linux, Documentation/networking/ip-sysctl.rst, accept_ra and forwarding.) IPv4 forwarding likewise
// changes the default of accept_redirects to off.
func (f *Firewall) EnableForwarding(v6 bool) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, fam := range f.families {
		if fam.v6 && !v6 {
			continue
		}
		if err := f.enableForwarding(fam); err != nil {
			return fmt.Errorf("enable %s forwarding: %w", fam, err)
		}
	}
	return nil
}

func (f *Firewall) enableForwarding(fam *family) error {
	sysctl := "/proc/sys/net/ipv4/ip_forward"
	if fam.v6 {
		sysctl = "/proc/sys/net/ipv6/conf/all/forwarding" // sets conf/default too
	}
	now, err := os.ReadFile(sysctl)
	if err != nil {
		return err
	}
	if string(bytes.TrimSpace(now)) != "0" {
		return nil
	}
	undo, err := dropForwarded(fam.ipt)
	if err != nil {
		return err
	}
	if err := os.WriteFile(sysctl, []byte("1"), 0); err != nil {
		undo()
		return err
	}
	f.log.Info("turned on forwarding; what no rule accepts is dropped", "family", fam, "sysctl", sysctl, "policy", "FORWARD DROP")
	return nil
}

// dropForwarded makes DROP the policy of filter FORWARD.
func dropForwarded(ipt *iptables.IPTables) (undo func(), err error) {
	rules, err := ipt.List("filter", "FORWARD")
	if err != nil {
		return nil, fmt.Errorf("read the policy of FORWARD: %w", err)
	}
	if err := ipt.ChangePolicy("filter", "FORWARD", "DROP"); err != nil {
		return nil, fmt.Errorf("set the policy of FORWARD: %w", err)
	}
	return func() {
		if len(rules) > 0 && rules[0] == "-P FORWARD ACCEPT" {
			ipt.ChangePolicy("filter", "FORWARD", "ACCEPT")
		}
	}, nil
}
