package firewall

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/usernet/usernet"
)

// counter stands between the firewall and one variant of iptables and counts the executions.
type counter struct {
	t   *testing.T
	log string
}

// count makes variant ("nft" or "legacy") what PATH calls iptables, until the test ends.
func count(t *testing.T, variant string) *counter {
	t.Helper()
	dir := t.TempDir()
	c := &counter{t, filepath.Join(dir, "log")}
	for _, family := range []string{"iptables", "ip6tables"} {
		for _, suffix := range []string{"", "-restore"} {
			real, err := exec.LookPath(family + "-" + variant + suffix)
			if err != nil {
				t.Fatal(err)
			}
			script := fmt.Sprintf("#!/bin/sh\necho \"${0##*/} $*\" >>%s\nexec %s \"$@\"\n", c.log, real)
			if err := os.WriteFile(filepath.Join(dir, family+suffix), []byte(script), 0o755); err != nil {
				t.Fatal(err)
			}
		}
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	c.since()
	return c
}

// since returns the executions since it was last called, the test's own included.
func (c *counter) since() []string {
	c.t.Helper()
	b, err := os.ReadFile(c.log)
	if err != nil && !os.IsNotExist(err) {
		c.t.Fatal(err)
	}
	os.Remove(c.log)
	return strings.FieldsFunc(string(b), func(r rune) bool { return r == '\n' })
}

func eachVariant(t *testing.T, f func(t *testing.T, c *counter)) {
	for _, variant := range []string{"nft", "legacy"} {
		t.Run(variant, func(t *testing.T) { f(t, count(t, variant)) })
	}
}

func TestSetAndClose(t *testing.T) {
	eachVariant(t, func(t *testing.T, c *counter) {
		before4, before6 := list(t, "iptables"), list(t, "ip6tables")
		f := newFirewall(t)
		set(t, f, sample())
		golden(t)
		c.since()

		set(t, f, sample())
		if did := c.since(); len(did) != 0 {
			t.Errorf("the second Set of the same executed %q", did)
		}
		if repaired, err := f.Check(); repaired || err != nil {
			t.Errorf("Check = %t, %v of what was just set", repaired, err)
		}
		for _, line := range c.since() {
			if !strings.Contains(line, " -S ") {
				t.Errorf("Check executed %q", line)
			}
		}

		for range 2 {
			if err := f.Close(); err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(before4+before6, list(t, "iptables")+list(t, "ip6tables")); d != "" {
				t.Errorf("after Close (-before +after):\n%s", d)
			}
		}
		c.since()
		if repaired, err := f.Check(); repaired || err != nil || len(c.since()) > 0 {
			t.Errorf("Check after Close = %t, %v", repaired, err)
		}
	})
}

// Publishing a port happens while docker run waits.
func TestSetAppliesTheDifference(t *testing.T) {
	eachVariant(t, func(t *testing.T, c *counter) {
		f := newFirewall(t)
		set(t, f, sample())
		c.since()
		restores := func(want ...string) {
			t.Helper()
			var got []string
			for _, line := range c.since() {
				name, _, _ := strings.Cut(line, " ")
				got = append(got, name)
			}
			if d := cmp.Diff(want, got); d != "" {
				t.Errorf("executions (-want +got):\n%s", d)
			}
		}

		s := sample()
		s.Networks[0].Forwards = append(s.Networks[0].Forwards,
			Forward{"tcp", netip.Addr{}, 8443, netip.MustParseAddrPort("10.200.1.2:443")},
			Forward{"tcp", netip.Addr{}, 8444, netip.MustParseAddrPort("10.200.1.2:444")})
		set(t, f, s)
		restores("iptables-restore")
		nat := run(t, "iptables -t nat -S USERNET-DNAT")
		for _, rule := range []string{"--dport 8443 -j DNAT --to-destination 10.200.1.2:443", "--dport 8444 -j DNAT --to-destination 10.200.1.2:444"} {
			if !strings.Contains(nat, rule) {
				t.Errorf("no rule %q in\n%s", rule, nat)
			}
		}
		c.since()
		set(t, f, sample())
		restores("iptables-restore")
		golden(t)
		c.since()

		// The last network of a family takes the family's chains along.
		s = sample()
		s.Networks = s.Networks[1:]
		set(t, f, s)
		restores("iptables-restore", "ip6tables-restore")
		if got := list(t, "ip6tables"); strings.Contains(got, "USERNET") {
			t.Errorf("IPv6 rules are left:\n%s", got)
		}
		set(t, f, sample())
		sameRules(t)
	})
}

// An earlier process was killed; what it left is replaced, not doubled.
func TestFirstSetClearsLeftovers(t *testing.T) {
	eachVariant(t, func(t *testing.T, c *counter) {
		killed := newFirewall(t)
		s := sample()
		s.Networks[0].Bridge = "unold"
		set(t, killed, s)
		run(t, "iptables -I FORWARD -j USERNET-FORWARD")
		set(t, newFirewall(t), sample())
		sameRules(t)

		set(t, newFirewall(t), State{})
		if got := list(t, "iptables") + list(t, "ip6tables"); strings.Contains(got, "USERNET") {
			t.Errorf("a Set of nothing left rules:\n%s", got)
		}
	})
}

func TestCheckRepairs(t *testing.T) {
	damage := map[string][]string{
		"flushed filter":    {"iptables -F"},
		"flushed nat":       {"iptables -t nat -F"},
		"flushed IPv6":      {"ip6tables -t mangle -F"},
		"everything gone":   {"iptables -F", "iptables -X", "iptables -t nat -F", "iptables -t nat -X", "iptables -t mangle -F", "iptables -t mangle -X"},
		"chain gone":        {"iptables -F", "iptables -X USERNET-FORWARD"},
		"rule deleted":      {"iptables -t nat -D USERNET-DNAT ! -i una -p tcp --dport 8080 -j DNAT --to-destination 10.200.1.2:80"},
		"rule added":        {"iptables -t nat -A USERNET-DNAT -p tcp --dport 22 -m comment --comment odd\"one -j DNAT --to-destination 10.200.1.2:22"},
		"rule doubled":      {"iptables -A USERNET-FORWARD -i una -j ACCEPT"},
		"jump doubled":      {"iptables -A FORWARD -j USERNET-FORWARD"},
		"jump without -m":   {"iptables -t nat -I PREROUTING -j USERNET-DNAT"},
		"isolation flushed": {"iptables -t mangle -F USERNET-ISOLATE"},
	}
	eachVariant(t, func(t *testing.T, c *counter) {
		f := newFirewall(t)
		set(t, f, sample())
		for name, lines := range damage {
			t.Run(name, func(t *testing.T) {
				for _, line := range lines {
					run(t, line)
				}
				if repaired, err := f.Check(); !repaired || err != nil {
					t.Errorf("Check = %t, %v", repaired, err)
				}
				sameRules(t)
				if repaired, err := f.Check(); repaired || err != nil {
					t.Errorf("second Check = %t, %v", repaired, err)
				}
			})
		}
		t.Run("Set repairs as well", func(t *testing.T) {
			run(t, "iptables -t nat -F")
			run(t, "iptables -t nat -X")
			s := sample()
			s.Networks[1].Masquerade = false
			set(t, f, s)
			set(t, f, sample())
			sameRules(t)
		})
	})
}

// The position of our jumps among other people's rules.
func TestJumpPosition(t *testing.T) {
	const ours = "-A FORWARD -j USERNET-FORWARD"
	tests := []struct {
		name     string
		above    []string // rules that were inserted above ours, first to last
		repaired bool
		want     []string
	}{
		{"reject above", []string{"-j REJECT"}, true, []string{ours, "-A FORWARD -j REJECT --reject-with icmp-port-unreachable"}},
		{"accept above", []string{"-i docker0 ! -o docker0 -j ACCEPT"}, false, []string{"-A FORWARD -i docker0 ! -o docker0 -j ACCEPT", ours}},
		{"Docker above", []string{"-j DOCKER-ISOLATION-STAGE-1", "-j DOCKER-USER"}, false,
			[]string{"-A FORWARD -j DOCKER-USER", "-A FORWARD -j DOCKER-ISOLATION-STAGE-1", ours}},
		{"drop between", []string{"-i eth9 -j DROP", "-j DOCKER-USER"}, true,
			[]string{"-A FORWARD -j DOCKER-USER", ours, "-A FORWARD -i eth9 -j DROP"}},
	}
	eachVariant(t, func(t *testing.T, c *counter) {
		for _, chain := range []string{"DOCKER-USER", "DOCKER-ISOLATION-STAGE-1"} {
			run(t, "iptables -N "+chain)
			t.Cleanup(func() { run(t, "iptables -X "+chain) })
		}
		for _, tt := range tests {
			t.Run(tt.name, func(t *testing.T) {
				f := newFirewall(t)
				set(t, f, sample())
				for _, rule := range tt.above {
					run(t, "iptables -I FORWARD "+rule)
					t.Cleanup(func() { run(t, "iptables -D FORWARD "+rule) })
				}
				if repaired, err := f.Check(); repaired != tt.repaired || err != nil {
					t.Errorf("Check = %t, %v; want %t", repaired, err, tt.repaired)
				}
				got := strings.Split(strings.TrimSpace(run(t, "iptables -S FORWARD")), "\n")[1:]
				if d := cmp.Diff(tt.want, got); d != "" {
					t.Errorf("FORWARD (-want +got):\n%s", d)
				}
				// From the beginning with Docker's rules there already, as after a restart of ours.
				if err := f.Close(); err != nil {
					t.Fatal(err)
				}
				set(t, f, sample())
				if repaired, err := f.Check(); repaired || err != nil {
					t.Errorf("Check after a new Set = %t, %v", repaired, err)
				}
			})
		}
		t.Run("nat", func(t *testing.T) {
			f := newFirewall(t)
			set(t, f, sample())
			run(t, "iptables -t nat -I PREROUTING -p tcp --dport 8080 -j RETURN")
			t.Cleanup(func() { run(t, "iptables -t nat -D PREROUTING -p tcp --dport 8080 -j RETURN") })
			if repaired, err := f.Check(); !repaired || err != nil {
				t.Errorf("Check = %t, %v", repaired, err)
			}
			got := strings.Split(run(t, "iptables -t nat -S PREROUTING"), "\n")
			if !strings.HasSuffix(got[1], "-j USERNET-DNAT") {
				t.Errorf("PREROUTING: %q", got)
			}
		})
	})
}

func TestSetRefusesBridgeNames(t *testing.T) {
	f := newFirewall(t)
	for _, name := range []string{"", "un+", "un a", "un\n-A", "-j", `u"n`, "a-name-of-too-many-bytes"} {
		if err := f.Set(State{Networks: []Network{{Bridge: name, Subnets: subnetsA}}}); err == nil {
			t.Errorf("Set took a bridge called %q", name)
		}
	}
}

func TestSetRefusesForwards(t *testing.T) {
	f := newFirewall(t)
	good := Forward{Proto: "tcp", HostPort: 80, Target: netip.MustParseAddrPort("10.200.1.2:80")}
	for name, spoil := range map[string]func(*Forward){
		"protocol":     func(f *Forward) { f.Proto = "tcp\n-A" },
		"no host port": func(f *Forward) { f.HostPort = 0 },
		"no port":      func(f *Forward) { f.Target = netip.AddrPortFrom(f.Target.Addr(), 0) },
		"no target":    func(f *Forward) { f.Target = netip.AddrPort{} },
		"mapped":       func(f *Forward) { f.Target = netip.MustParseAddrPort("[::ffff:10.200.1.2]:80") },
		"zone":         func(f *Forward) { f.Target = netip.MustParseAddrPort("[fe80::2%lo]:80") },
	} {
		bad := good
		spoil(&bad)
		err := f.Set(State{Networks: []Network{{Bridge: "una", Subnets: subnetsA, Forwards: []Forward{good, bad}}}})
		if !errors.Is(err, usernet.ErrInvalid) {
			t.Errorf("%s: Set = %v, want ErrInvalid", name, err)
		}
	}
}

// Forwarding that we turn on must not make a router of the machine.
func TestEnableForwarding(t *testing.T) {
	const v4, v6 = "net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"
	read := func(path string) string {
		b, err := os.ReadFile("/proc/sys/" + path)
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(b))
	}
	policy := func(ipt string) string {
		line, _, _ := strings.Cut(run(t, ipt+" -S FORWARD"), "\n")
		return line
	}
	t.Cleanup(func() {
		run(t, "iptables -P FORWARD ACCEPT")
		run(t, "ip6tables -P FORWARD ACCEPT")
	})
	sysctl(t, v4, "0")
	sysctl(t, v6, "0")
	f, err := New(slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		v6         bool
		want4, pf4 string
		want6, pf6 string
	}{
		{false, "1", "-P FORWARD DROP", "0", "-P FORWARD ACCEPT"},
		{true, "1", "-P FORWARD DROP", "1", "-P FORWARD DROP"},
	} {
		if err := f.EnableForwarding(tt.v6); err != nil {
			t.Fatal(err)
		}
		if got := read(v4); got != tt.want4 || policy("iptables") != tt.pf4 {
			t.Errorf("v6=%t: IPv4 %s, %s", tt.v6, got, policy("iptables"))
		}
		if got := read(v6); got != tt.want6 || policy("ip6tables") != tt.pf6 {
			t.Errorf("v6=%t: IPv6 %s, %s", tt.v6, got, policy("ip6tables"))
		}
	}
	// Where the administrator turned it on, the policy is the administrator's.
	run(t, "iptables -P FORWARD ACCEPT")
	if err := f.EnableForwarding(false); err != nil {
		t.Fatal(err)
	}
	if got := policy("iptables"); got != "-P FORWARD ACCEPT" {
		t.Errorf("policy %s of a machine that forwarded already", got)
	}
}

func TestNewWithoutPrograms(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("PATH", dir)
	if _, err := New(slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), "install") {
		t.Errorf("New without iptables: %v, want what to install", err)
	}
	for _, name := range []string{"iptables", "iptables-restore"} {
		if err := os.Symlink("/usr/sbin/"+name, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	f, err := New(slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatalf("New without ip6tables: %v", err)
	}
	if err := errors.Join(f.Set(sample()), f.Close()); err != nil {
		t.Errorf("IPv4 alone: %v", err)
	}
}

// What docker run -p waits for.
func BenchmarkPublishAndUnpublish(b *testing.B) {
	f, err := New(slog.New(slog.DiscardHandler))
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	without, with := sample(), sample()
	without.Networks[0].Forwards = without.Networks[0].Forwards[1:]
	for b.Loop() {
		if err := errors.Join(f.Set(without), f.Set(with)); err != nil {
			b.Fatal(err)
		}
	}
}
