package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"

	"github.com/vishvananda/netlink"

	"github.com/usernet/usernet/internal/netns"
)

// ordinary is the user whom the peers for ordinary users run as; rig.settings made it.
var ordinary = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 1000, Gid: 1000}}

// installed returns the path in the pretend host of a program: one that test/setup.sh built, or else a package's.
func (b *rig) installed(name string) (string, error) {
	cache := os.Getenv("USERNET_TEST_CACHE")
	if cache == "" {
		cache = "/var/cache/usernet-test"
	}
	built, err := os.ReadFile(filepath.Join(cache, "peers", name))
	if errors.Is(err, os.ErrNotExist) {
		path := "/usr/bin/" + name
		if _, err := os.Stat(b.Path(path)); err != nil {
			return "", fmt.Errorf("%s is not installed; test/setup.sh bench does it", name)
		}
		return path, nil
	}
	if err != nil {
		return "", err
	}
	path := filepath.Join(b.Dir, "bin", name)
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	return path, os.WriteFile(path, built, 0o755)
}

// spawn starts a daemon of the subject.
func (b *rig) spawn(s *subject, name string, cmd *exec.Cmd) (*daemon, error) {
	d, err := b.daemon(fmt.Sprintf("%s%d", name, s.index), cmd)
	if err == nil {
		s.site.daemons = append(s.site.daemons, d)
	}
	return d, err
}

// agentCommand is the command line of the agent inside a subject.
func (b *rig) agentCommand(s *subject) []string {
	return []string{b.exe(), "agent", b.control(s.controlName()), fmt.Sprintf("0.0.0.0:%d", s.innerPort())}
}

// agentAlone starts an agent in a new network namespace that nothing leads out of. The number is the agent's in the
// pretend host's process namespace.
func (b *rig) agentAlone(s *subject) (d *daemon, pid int, err error) {
	args := b.agentCommand(s)
	cmd := b.Command(context.Background(), args[0], args[1:]...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	if d, err = b.spawn(s, "agent", cmd); err != nil {
		return nil, 0, err
	}
	r, err := b.remote(s.controlName(), d)
	if err != nil {
		return nil, 0, err
	}
	p, err := r.Place(b.ctx)
	return d, p.PID, err
}

// forwarderOf says that all processes of a peer but its agent carry the load, and that a restart is a new peer.
func (b *rig) forwarderOf(s *subject) {
	s.site.forwarder = func() (ps []process) {
		for _, d := range s.site.daemons {
			ps = append(ps, unnamed(processes(d.cmd.Process.Pid), "bench")...)
		}
		return ps
	}
	s.site.restart = func() error {
		s.site.stop()
		if err := b.begin(s); err != nil {
			return err
		}
		return s.missing // it did not come back
	}
}

// The wires of the kernel veth: to the outside, and to the pretend host for what stands beside its localhost.
var (
	vethOutside = netip.MustParsePrefix("10.201.0.1/24")
	vethInside  = netip.MustParsePrefix("10.201.0.2/24")
	vethHost    = netip.MustParsePrefix("10.201.1.1/24")
	vethInside2 = netip.MustParsePrefix("10.201.1.2/24")
)

// startVeth joins a namespace to the outside by a veth, with no host between.
func (b *rig) startVeth(s *subject) error {
	d, _, err := b.agentAlone(s)
	if err != nil {
		return err
	}
	inside, err := namespaceOf(d)
	if err != nil {
		return err
	}
	defer inside.Close()
	if err := wire(b.Outside().NS(), inside, "bench", vethOutside, vethInside); err != nil {
		return err
	}
	if err := wire(b.NS(), inside, "host", vethHost, vethInside2); err != nil {
		return err
	}
	s.site.published = netip.AddrPortFrom(vethInside.Addr(), agentPort)
	s.site.local = netip.AddrPortFrom(vethInside2.Addr(), agentPort)
	return inside.Do(func() error {
		route := &netlink.Route{Gw: vethOutside.Addr().AsSlice()}
		if err := netlink.RouteAdd(route); err != nil {
			return fmt.Errorf("add default route: %w", err)
		}
		return nil
	})
}

// wire makes a veth called name, with the address here, whose other end in there has the address far.
func wire(here, there *netns.NS, name string, near, far netip.Prefix) error {
	set := func(addr netip.Prefix) error {
		l, err := netlink.LinkByName(name)
		if err != nil {
			return fmt.Errorf("find %s: %w", name, err)
		}
		ipnet := &net.IPNet{IP: addr.Addr().AsSlice(), Mask: net.CIDRMask(addr.Bits(), 32)}
		if err := netlink.AddrAdd(l, &netlink.Addr{IPNet: ipnet}); err != nil {
			return fmt.Errorf("add %s to %s: %w", addr, name, err)
		}
		return netlink.LinkSetUp(l)
	}
	err := here.Do(func() error {
		la := netlink.NewLinkAttrs()
		la.Name = name
		veth := &netlink.Veth{LinkAttrs: la, PeerName: name, PeerNamespace: netlink.NsFd(there.Fd())}
		if err := netlink.LinkAdd(veth); err != nil {
			return fmt.Errorf("add veth %s: %w", name, err)
		}
		return set(near)
	})
	if err != nil {
		return err
	}
	return there.Do(func() error { return set(far) })
}

// startPasta has pasta make the namespace, as an ordinary user: as root it becomes nobody.
func (b *rig) startPasta(s *subject) error {
	pasta, err := b.installed("pasta")
	if err != nil {
		return err
	}
	args := []string{"--config-net", "-4", "-m", strconv.Itoa(s.mtu), "-u", "none", "-T", "none", "-U", "none",
		"-t", fmt.Sprintf("%d:%d", s.publicPort(), agentPort), "--"}
	cmd := b.Command(context.Background(), pasta, append(args, b.agentCommand(s)...)...)
	cmd.SysProcAttr = ordinary
	if _, err := b.spawn(s, "pasta", cmd); err != nil {
		return err
	}
	s.site.publishes(s.publicPort())
	b.forwarderOf(s)
	return nil
}

// startSlirp hangs slirp4netns into a namespace and asks its API for the port.
func (b *rig) startSlirp(s *subject) error {
	slirp, err := b.installed("slirp4netns")
	if err != nil {
		return err
	}
	_, pid, err := b.agentAlone(s)
	if err != nil {
		return err
	}
	api := filepath.Join(b.Dir, fmt.Sprintf("slirp%d.sock", s.index))
	os.Remove(api)
	cmd := b.Command(context.Background(), slirp, "-c", "-m", strconv.Itoa(s.mtu), "-a", api, strconv.Itoa(pid), "tap0")
	d, err := b.spawn(s, "slirp4netns", cmd)
	if err != nil {
		return err
	}
	s.site.publishes(s.publicPort())
	b.forwarderOf(s)
	ask := fmt.Sprintf(`{"execute": "add_hostfwd", "arguments":
		{"proto": "tcp", "host_addr": "0.0.0.0", "host_port": %d, "guest_port": %d}}`, s.publicPort(), agentPort)
	return b.until(func() error { return askSlirp(api, ask) }, d)
}

// askSlirp sends slirp4netns one request, which the end of the stream completes.
func askSlirp(api, request string) error {
	c, err := net.Dial("unix", api)
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := io.WriteString(c, request); err != nil {
		return err
	}
	if err := c.(*net.UnixConn).CloseWrite(); err != nil {
		return err
	}
	var answer struct{ Error json.RawMessage }
	if err := json.NewDecoder(io.LimitReader(c, 1<<16)).Decode(&answer); err != nil {
		return fmt.Errorf("slirp4netns: read the answer: %w", err)
	}
	if answer.Error != nil {
		return fmt.Errorf("slirp4netns: %s", answer.Error)
	}
	return nil
}

// gvproxy's own addresses, which it has no flags for in its releases.
const gvproxyLink = `ip tuntap add tap0 mode tap && ip link set tap0 address 5a:94:ef:e4:0c:ee mtu %d up &&
	ip addr add 192.168.127.2/24 dev tap0 && ip route add default via 192.168.127.1`

// gvproxy returns what joins a gvproxy and its forwarder by a unix socket, as a virtual machine's vsock would. proxy and
// forwarder find the two: the real ones, or usernet under their names.
func gvproxy(proxy, forwarder func(*rig, string) (string, error)) func(*rig, *subject) error {
	return func(b *rig, s *subject) error {
		gateway, err := proxy(b, "gvproxy")
		if err != nil {
			return err
		}
		guest, err := forwarder(b, "gvforwarder")
		if err != nil {
			return err
		}
		mtu := strconv.Itoa(s.mtu)
		within, socket, err := b.startGateway(s, gateway, "-ssh-port", "-1")
		if err != nil {
			return err
		}
		if _, err := b.Run(b.ctx, "nsenter", within, "sh", "-c", fmt.Sprintf(gvproxyLink, s.mtu)); err != nil {
			return err
		}
		_, err = b.spawn(s, "gvforwarder", b.Command(context.Background(), "nsenter", within, guest,
			"-preexisting", "-iface", "tap0", "-stop-if-exist", "", "-mtu", mtu, "-url", "unix://"+socket))
		return err
	}
}

// startUsernet joins usernet's own gateway and agent in the same way: frames as long as they agree on, and all settings by DHCP.
func (b *rig) startUsernet(s *subject) error {
	usernet := filepath.Join(b.Dir, "bin/usernet")
	services := filepath.Join(b.Dir, fmt.Sprintf("services%d.sock", s.index)) // the usual one can be one gateway's only
	within, socket, err := b.startGateway(s, usernet, "gateway", "-services", "unix://"+services)
	if err != nil {
		return err
	}
	_, err = b.spawn(s, "agent", b.Command(context.Background(), "nsenter", within, usernet, "agent",
		"-iface", "tap0", "-resolv-conf", "", "-url", "unix://"+socket))
	return err
}

// startGateway starts a gateway on a unix socket for a namespace, how to enter which it returns, and publishes the agent's port.
func (b *rig) startGateway(s *subject, program string, args ...string) (within, socket string, err error) {
	_, pid, err := b.agentAlone(s)
	if err != nil {
		return "", "", err
	}
	socket = filepath.Join(b.Dir, fmt.Sprintf("gvproxy%d.sock", s.index))
	os.Remove(socket)
	args = append(args, "-listen", "unix://"+socket, "-mtu", strconv.Itoa(s.mtu))
	d, err := b.spawn(s, "gateway", b.Command(context.Background(), program, args...))
	if err != nil {
		return "", "", err
	}
	s.site.publishes(s.publicPort())
	b.forwarderOf(s)
	expose := fmt.Sprintf(`{"local":":%d","remote":"192.168.127.2:%d"}`, s.publicPort(), agentPort)
	err = b.until(func() error { return b.askGvproxy(socket, expose) }, d)
	return fmt.Sprintf("--net=/proc/%d/ns/net", pid), socket, err
}

// dropIn is usernet under another program's name.
func (b *rig) dropIn(name string) (string, error) {
	path := filepath.Join(b.Dir, "dropin", name)
	err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.Symlink("../bin/usernet", path))
	if errors.Is(err, os.ErrExist) {
		err = nil
	}
	return path, err
}

// askGvproxy asks for a port by gvproxy's API.
func (b *rig) askGvproxy(socket, expose string) error {
	const url = "http://gvproxy/services/forwarder/expose"
	req, err := http.NewRequestWithContext(b.ctx, http.MethodPost, url, bytes.NewBufferString(expose))
	if err != nil {
		return err
	}
	tr := &http.Transport{DialContext: b.DialUnix(socket), DisableKeepAlives: true}
	resp, err := tr.RoundTrip(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 1000))
		return fmt.Errorf("gvproxy: %s: %s", resp.Status, text)
	}
	return nil
}

// rootlesskit returns what starts RootlessKit, as an ordinary user, with a network and a port driver.
func rootlesskit(network, ports string) func(*rig, *subject) error {
	return func(b *rig, s *subject) error {
		kit, err := b.installed("rootlesskit")
		if err != nil {
			return err
		}
		args := []string{"--net", network, "--mtu", strconv.Itoa(s.mtu), "--port-driver", ports, "--copy-up", "/etc",
			"--state-dir", fmt.Sprintf("/run/bench/state%d", s.index)}
		if !s.same {
			args = append(args, "-p", fmt.Sprintf("0.0.0.0:%d:%d/tcp", s.publicPort(), agentPort))
		}
		cmd := b.Command(context.Background(), kit, append(args, b.agentCommand(s)...)...)
		cmd.SysProcAttr = ordinary
		cmd.Env = append(cmd.Env, "HOME=/tmp", "USER=bench", "XDG_RUNTIME_DIR=/run/bench")
		if _, err := b.spawn(s, "rootlesskit", cmd); err != nil {
			return err
		}
		s.site.publishes(s.publicPort())
		b.forwarderOf(s)
		return nil
	}
}
