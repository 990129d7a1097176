package doctor

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func TestTUN(t *testing.T) {
	dir := t.TempDir()
	there := filepath.Join(dir, "tun")
	if err := os.WriteFile(there, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, a := range []struct {
		path string
		answer
	}{
		{there, answer{name: "there", world: world{results: works(nil)}, status: OK, detail: "opens"}},
		{filepath.Join(dir, "none"), answer{name: "not there", status: Missing, detail: "--device", fix: "sudo modprobe tun"}},
		{there, answer{name: "no device", world: world{results: works(map[string]string{tryTUN: "make a TUN device: busy"})}, status: Missing, detail: "busy"}},
	} {
		t.Run(a.name, func(t *testing.T) {
			m := a.world.machine()
			m.tunPath = a.path
			a.compare(t, m, (*machine).tun)
			if f, _ := m.tun(t.Context()); !f.essential {
				t.Error("not essential")
			}
		})
	}
}

func TestKernelFeatures(t *testing.T) {
	looks := map[string]func(*machine, context.Context) (finding, bool){
		tryOffload: (*machine).offload, tryNftables: (*machine).nftables, trySocket: (*machine).transparent, trySource: (*machine).transparent,
		tryTProxy: (*machine).fastPath, tryFast: (*machine).fastPath, tryConntrack: (*machine).conntrack,
	}
	fixes := map[string]string{
		tryNftables: "modprobe nf_tables", trySocket: "modprobe nft_socket", trySource: "modprobe nft_socket",
		tryTProxy: "modprobe nft_tproxy", tryFast: "modprobe nft_tproxy", tryConntrack: "modprobe nf_conntrack_netlink",
	}
	for name, look := range looks {
		answer{name: name, world: world{results: works(nil)}, status: OK}.check(t, look)
		answer{name: name + " broken", world: world{results: works(map[string]string{name: "bad luck"})},
			status: Warning, detail: "bad luck", fix: fixes[name]}.check(t, look)
		answer{name: name + " refused"}.check(t, look) // the trial itself tells
	}
	// Without nftables, the rules were not tried; one line about it is enough.
	rs := works(map[string]string{tryNftables: "none"})
	delete(rs, trySocket)
	delete(rs, tryTProxy)
	answer{name: "client addresses without nftables", world: world{results: rs}}.check(t, (*machine).transparent)
	answer{name: "fast path without nftables", world: world{results: rs}}.check(t, (*machine).fastPath)
}

func TestIptables(t *testing.T) {
	installed := map[string]string{"/usr/sbin/iptables": "#!", "/usr/bin/dnf": "#!"}
	nft := map[string]string{"/usr/sbin/iptables --version": "iptables v1.8.9 (nf_tables)"}
	legacy := map[string]string{"/usr/sbin/iptables --version": "iptables v1.8.9 (legacy)"}
	bad := works(map[string]string{tryIptables: "no such extension"})
	for _, a := range []answer{
		{name: "not installed", world: world{files: map[string]string{"/usr/bin/dnf": "#!"}}, status: Warning, detail: "mode bridge", fix: "sudo dnf install iptables"},
		{name: "does not run", world: world{files: installed, commands: map[string]string{"/usr/sbin/iptables --version": "!no library"}},
			status: Warning, detail: "no library", fix: "dnf install"},
		{name: "nft", world: world{files: installed, commands: nft, results: works(nil)}, status: OK, detail: "v1.8.9 (nf_tables)"},
		{name: "untried", world: world{files: installed, commands: nft}, status: Info, detail: "could not be tried"},
		{name: "nft broken", world: world{files: installed, commands: nft, results: bad, root: true}, status: Warning, detail: "no such extension", fix: "modprobe -a nft_compat"},
		{name: "legacy broken", world: world{files: installed, commands: legacy, results: bad}, status: Warning, detail: "legacy", fix: "sudo modprobe -a iptable_nat iptable_mangle"},
	} {
		a.check(t, (*machine).iptables)
	}
	files := map[string]string{"/usr/sbin/ip6tables": "#!"}
	commands := map[string]string{"/usr/sbin/ip6tables --version": "ip6tables v1.8.9 (legacy)"}
	bad = works(map[string]string{tryIP6tables: "none"})
	answer{name: "IPv6", world: world{files: files, commands: commands, results: bad}, status: Warning, detail: "IPv6", fix: "ip6table_nat"}.check(t, (*machine).ip6tables)
}

func TestForwarding(t *testing.T) {
	const name = "net/ipv4/ip_forward"
	answer{name: "on", world: world{files: sysctls(name, "1")}, status: OK}.check(t, (*machine).forwarding)
	answer{name: "off", world: world{files: sysctls(name, "0")}, status: Info, detail: "turns it on"}.check(t, (*machine).forwarding)
	answer{name: "hidden"}.check(t, (*machine).forwarding)
}

func TestBridgeFilter(t *testing.T) {
	const name = "net/bridge/bridge-nf-call-iptables"
	answer{name: "on", world: world{files: sysctls(name, "1")}, status: Info, detail: "br_netfilter"}.check(t, (*machine).bridgeFilter)
	answer{name: "off", world: world{files: sysctls(name, "0")}}.check(t, (*machine).bridgeFilter)
	answer{name: "not loaded"}.check(t, (*machine).bridgeFilter)
}

const (
	zeros      = "00000000000000000000000000000000"
	rejectIPv6 = zeros + " 00 " + zeros + " 00 " + zeros + " ffffffff 00000001 00000000 00200200       lo\n"
	routeIPv6  = zeros + " 00 " + zeros + " 00 fe800000000000000000000000000001 00000400 00000001 00000000 00450003     eth0\n"
	subnetIPv6 = "20010db8000000000000000000000000 40 " + zeros + " 00 " + zeros + " 00000100 00000001 00000000 00000001     eth0\n"
)

func TestIPv6(t *testing.T) {
	const all = "net/ipv6/conf/all/disable_ipv6"
	route := func(text string) map[string]string { return map[string]string{"/proc/net/ipv6_route": text} }
	for _, a := range []answer{
		{name: "absent", status: Warning, detail: "ipv6.disable=1"},
		{name: "disabled", world: world{files: sysctls(all, "1")}, status: Warning, detail: "switched off", fix: "disable_ipv6=0"},
		{name: "no route", world: world{files: join(sysctls(all, "0"), route(subnetIPv6+rejectIPv6))}, status: Info, detail: "no IPv6 route"},
		{name: "route", world: world{files: join(sysctls(all, "0"), route(subnetIPv6+routeIPv6+rejectIPv6))}, status: OK},
	} {
		a.check(t, (*machine).ipv6)
	}
}

func TestVsock(t *testing.T) {
	answer{name: "bare", status: Info, detail: "virtual machines only"}.check(t, (*machine).vsock)
	full := map[string]string{"/dev/vhost-vsock": "", "/sys/module/vsock_loopback/refcnt": "0"}
	answer{name: "host", world: world{files: full}, status: Info, detail: "vhost-vsock); loopback works"}.check(t, (*machine).vsock)
}

func TestHostGateway(t *testing.T) {
	answer{name: "none"}.check(t, (*machine).hostGateway)
	socket := filepath.Join(t.TempDir(), "gateway.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	m := world{}.machine()
	m.cfg.Daemon.HostGateway = "unix://" + socket
	answer{status: OK, detail: socket}.compare(t, m, (*machine).hostGateway)
	l.Close()
	answer{status: Warning, detail: "no such file"}.compare(t, m, (*machine).hostGateway)
}

func TestUserNamespaces(t *testing.T) {
	for _, tt := range []struct{ name, value, reason, fix string }{
		{"kernel/unprivileged_userns_clone", "0", "kernel.unprivileged_userns_clone is 0", "kernel.unprivileged_userns_clone=1"},
		{"user/max_user_namespaces", "0", "user.max_user_namespaces is 0", "user.max_user_namespaces=16384"},
		{"user/max_net_namespaces", "0", "user.max_net_namespaces is 0", "user.max_net_namespaces=16384"},
		{"kernel/apparmor_restrict_unprivileged_userns", "1", "apparmor_restrict_unprivileged_userns is 1", "userns=0"},
		{"kernel/unprivileged_userns_clone", "1", "something forbids it", ""},
	} {
		files := sysctls(tt.name, tt.value)
		answer{name: tt.reason, world: world{files: files}, status: Missing, detail: tt.reason, fix: tt.fix}.check(t, (*machine).userNamespaces)
		// Root may all the same, and learns what others will find.
		if tt.fix != "" {
			answer{name: tt.reason + " for others", world: world{files: files, results: works(nil), root: true},
				status: Warning, detail: tt.reason, fix: tt.fix}.check(t, (*machine).userNamespaces)
		}
	}
	// With AppArmor's restriction they can be made, but root in them is nobody.
	powerless := results{tryLinks: {Err: "bring up lo: operation not permitted", Errno: 1}}
	for _, a := range []answer{
		{name: "powerless", world: world{results: powerless}, status: Missing, detail: "something forbids"},
		{name: "powerless for others", world: world{results: powerless, root: true}, status: Warning, detail: "Only root"},
		{name: "fine", world: world{results: works(nil)}, status: OK, detail: "you may"},
		{name: "fine for others", world: world{results: works(nil), root: true}, status: OK, detail: "ordinary users may"},
	} {
		a.check(t, (*machine).userNamespaces)
	}
}

func TestLimits(t *testing.T) {
	const ports, pipes, queue = "net/ipv4/ip_unprivileged_port_start", "fs/pipe-user-pages-soft", "net/core/somaxconn"
	answer{name: "root's ports", world: world{root: true}, status: OK}.check(t, (*machine).lowPorts)
	answer{name: "all ports", world: world{files: sysctls(ports, "0")}, status: OK}.check(t, (*machine).lowPorts)
	answer{name: "high ports", world: world{files: sysctls(ports, "1024")}, status: Info, detail: "from 1024", fix: "port_start=80"}.check(t, (*machine).lowPorts)
	answer{name: "root's pipes", world: world{files: sysctls(pipes, "16"), root: true}, status: OK}.check(t, (*machine).pipes)
	answer{name: "pipes", world: world{files: sysctls(pipes, "16384")}, status: OK, detail: "64 transfers"}.check(t, (*machine).pipes)
	answer{name: "few pipes", world: world{files: sysctls(pipes, "1024")}, status: Warning, fix: "=16384"}.check(t, (*machine).pipes)
	answer{name: "no limit of pipes", world: world{files: sysctls(pipes, "0")}, status: OK, detail: "no limit"}.check(t, (*machine).pipes)
	answer{name: "queue", world: world{files: sysctls(queue, "4096")}, status: OK, detail: "4096"}.check(t, (*machine).listenQueue)
	answer{name: "short queue", world: world{files: sysctls(queue, "128")}, status: Warning, detail: "128", fix: "somaxconn=4096"}.check(t, (*machine).listenQueue)
	for limit, s := range map[uint64]Status{1024: Warning, 1 << 20: OK} {
		if f, _ := (world{}).machine().filesUpTo(limit); f.status != s {
			t.Errorf("%d files: %v, want %s", limit, f, s)
		}
	}
}

func TestSELinux(t *testing.T) {
	const name = "/sys/fs/selinux/enforce"
	answer{name: "none"}.check(t, (*machine).selinux)
	answer{name: "permissive", world: world{files: map[string]string{name: "0"}}}.check(t, (*machine).selinux)
	answer{name: "enforcing", world: world{files: map[string]string{name: "1"}}, status: Info, fix: "restorecon"}.check(t, (*machine).selinux)
}

func TestTrialNetwork(t *testing.T) {
	for _, a := range []answer{
		{name: "works", world: world{results: works(nil)}, status: OK, detail: "they work for you"},
		{name: "fails", world: world{results: works(map[string]string{tryUsermode: "no sysctl"})}, status: Missing, detail: "no sysctl"},
		{name: "settings", world: world{results: results{tryUsermode: {Err: "set net.ipv4.ip_forward", Errno: unix.EROFS}}}, status: Missing, detail: "--privileged"},
		{name: "refused", status: Missing, detail: "user namespaces"},
		{name: "refused to root", world: world{root: true}, status: Missing, detail: "CAP_SYS_ADMIN"},
	} {
		a.check(t, (*machine).usermode)
	}
}

func TestConfiguration(t *testing.T) {
	there := map[string]string{"/etc/usernet/usernet.conf": ""}
	answer{name: "none", status: OK, detail: "defaults"}.check(t, (*machine).configuration)
	answer{name: "there", world: world{files: there}, status: OK, detail: "understood"}.check(t, (*machine).configuration)
	for err, s := range map[error]Status{errors.New("line 3: unknown setting"): Missing, os.ErrPermission: Info} {
		m := world{files: there}.machine()
		m.cfg.Faulty = err
		if f, _ := m.configuration(t.Context()); f.status != s {
			t.Errorf("%v: %v, want %s", err, f, s)
		}
	}
}

func TestResolvers(t *testing.T) {
	conf := func(text string) world { return world{files: map[string]string{"/etc/resolv.conf": text}} }
	for _, a := range []answer{
		{name: "no file", status: Warning, detail: "cannot be read"},
		{name: "empty", world: conf("options edns0\n"), status: Warning, detail: "names none"},
		{name: "two", world: conf("nameserver 192.0.2.1\nnameserver 2001:db8::1\n"), status: OK, detail: "192.0.2.1, 2001:db8::1,"},
		{name: "loopback", world: conf("nameserver 127.0.0.53\n"), status: OK, detail: "which is fine"},
	} {
		a.check(t, (*machine).resolvers)
	}
}
