package doctor

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"

	"github.com/usernet/usernet/internal/netns"
	"github.com/usernet/usernet/internal/nettest"
)

// litter leaves what a daemon leaves that was killed.
func litter(t *testing.T, runDir string) {
	t.Helper()
	ns, err := netns.Create(filepath.Join(runDir, "netns", "0123456789ab"))
	if err != nil {
		t.Fatal(err)
	}
	ns.Close()
	for _, name := range []string{"unb0123456789ab", "un0123456789ab", "unrelated0"} {
		if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: name}}); err != nil {
			t.Fatal(err)
		}
	}
	c, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	c.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: hostTable})
	c.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "unrelated"})
	if err := c.Flush(); err != nil {
		t.Fatal(err)
	}
	shell(t, `iptables -t nat -N USERNET-DNAT && iptables -t nat -A PREROUTING -j USERNET-DNAT &&
		ip6tables -t mangle -N USERNET-ISOLATE && iptables -N UNRELATED`)
}

func shell(t *testing.T, command string) string {
	t.Helper()
	out, err := exec.Command("sh", "-c", command).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", command, err, out)
	}
	return string(out)
}

// The command that is named for left-overs removes them, and nothing else.
func TestLeftOvers(t *testing.T) {
	nettest.NoLeaks(t)
	m := newMachine(testConfig())
	m.cfg.Daemon.RunDir = filepath.Join(t.TempDir(), "run")
	answer{status: OK, detail: "none"}.compare(t, m, (*machine).leftOvers)
	litter(t, m.cfg.Daemon.RunDir)

	f, ok := m.leftOvers(t.Context())
	if !ok || f.status != Warning {
		t.Fatalf("got %v, want a warning", f)
	}
	for _, part := range []string{"one network namespace (0123456789ab)", "2 links (", "un0123456789ab", "one nftables table (usernet-ports)",
		"2 iptables chains (USERNET-DNAT, USERNET-ISOLATE)"} {
		if !strings.Contains(f.detail, part) {
			t.Errorf("%q does not mention %q", f.detail, part)
		}
	}
	shell(t, f.fix)
	answer{status: OK, detail: "none"}.compare(t, m, (*machine).leftOvers)
	if rules := shell(t, "nft list ruleset; iptables-save; ip6tables-save"); !strings.Contains(rules, "UNRELATED") ||
		!strings.Contains(rules, "table inet unrelated") || strings.Contains(rules, "USERNET") {
		t.Errorf("after %s the rules are:\n%s", f.fix, rules)
	}
	shell(t, "ip link delete unrelated0; nft flush ruleset")
	if _, err := os.Stat(filepath.Join(m.cfg.Daemon.RunDir, "netns")); !os.IsNotExist(err) {
		t.Errorf("the pins are left: %v", err)
	}
}

func TestLeftOversWithDaemon(t *testing.T) {
	m := world{}.machine()
	m.cfg.Ask = func(context.Context, string) (Daemon, error) { return Daemon{}, nil }
	answer{status: OK, detail: "clears up"}.compare(t, m, (*machine).leftOvers)
	m.cfg.Ask = func(context.Context, string) (Daemon, error) { return Daemon{}, os.ErrPermission }
	answer{}.compare(t, m, (*machine).leftOvers)
}

func TestLegacyChains(t *testing.T) {
	m := world{
		files:    map[string]string{"/usr/sbin/iptables-legacy-save": "#!", "/usr/sbin/iptables-save": "#!"},
		commands: map[string]string{"/usr/sbin/iptables-legacy-save": "*nat\n:PREROUTING ACCEPT [0:0]\n:USERNET-DNAT - [0:0]\n:DOCKER - [0:0]\nCOMMIT"},
	}.machine()
	if got := m.legacyChains(t.Context(), "iptables"); len(got) != 1 || got[0] != "USERNET-DNAT" {
		t.Errorf("got %q, want USERNET-DNAT", got)
	}
	if got := m.legacyChains(t.Context(), "ip6tables"); got != nil {
		t.Errorf("without the program: %q", got)
	}
}
