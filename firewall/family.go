package firewall

import (
	"bytes"
	"errors"
	"fmt"
	"os/exec"
	"strconv"
	"strings"

	"github.com/coreos/go-iptables/iptables"
)

// lockWait is how many seconds an iptables execution waits for another one to let go of the xtables lock.
const lockWait = 10

// family is the rules of one address family in the kernel. go-iptables finds the programs and reads; changes go through
// iptables-restore, which takes any number of them in one execution and commits each table in one piece.
type family struct {
	v6      bool
	ipt     *iptables.IPTables
	restore string // the program

	want     ruleset // what was last asked for
	known    bool    // the kernel had want when we last looked
	declared bool    // the kernel had rules of this process at some time
}

func newFamily(proto iptables.Protocol) (*family, error) {
	f := &family{v6: proto == iptables.ProtocolIPv6}
	name := "iptables"
	if f.v6 {
		name = "ip6tables"
	}
	var err error
	if f.restore, err = exec.LookPath(name + "-restore"); err != nil {
		return nil, err
	}
	f.ipt, err = iptables.New(iptables.IPFamily(proto), iptables.Timeout(lockWait))
	return f, err
}

func (f *family) String() string {
	if f.v6 {
		return "IPv6"
	}
	return "IPv4"
}

// set trusts what it remembers, which saves reading the kernel's rules while a container waits for its port. When the
// kernel does not accept the difference to that, somebody was there: it then looks, and tries again.
func (f *family) set(want ruleset) error {
	have, known := f.want, f.known
	f.want, f.known = want, false
	// The first jump's position depends on what others have in the chain.
	if known && (!have.empty() || want.empty()) {
		if err := f.change(diff(have, want)); err == nil {
			f.known = true
			return nil
		}
	}
	_, err := f.repair()
	return err
}

// repair makes the kernel's rules those wanted, whatever they are now, and reports whether they were others. Where
// nothing is wanted and what an earlier process left is gone, it does not look: nothing of ours can be missing.
func (f *family) repair() (changed bool, err error) {
	if f.known && f.want.empty() {
		return false, nil
	}
	have, err := f.read()
	if err != nil {
		// A kernel without this family, or without its nat table, has nothing of ours.
		if f.want.empty() && !f.declared {
			return false, nil
		}
		return false, err
	}
	script := diff(have, f.want)
	f.known = false
	if err := f.change(script); err != nil {
		return false, err
	}
	f.known = true
	return script != "", nil
}

// remove takes everything of ours away, whether it was remembered or not.
func (f *family) remove() error {
	f.want, f.known = ruleset{}, false
	_, err := f.repair()
	return err
}

// read lists our chains and our jumps in the kernel.
func (f *family) read() (ruleset, error) {
	r := ruleset{chains: map[string][]string{}, places: map[string]place{}}
	for _, t := range tables {
		for _, c := range t.chains {
			rules, exists, err := f.list(t.name, c)
			if err != nil {
				return ruleset{}, err
			}
			if exists {
				r.chains[c] = rules
			}
		}
		for _, h := range t.hooks {
			rules, _, err := f.list(t.name, h.base)
			if err != nil {
				return ruleset{}, err
			}
			r.places[t.name+" "+h.base] = placeOf(h, rules, f.v6)
		}
	}
	return r, nil
}

// list returns the rules of a chain without "-A CHAIN ", and whether the chain exists.
func (f *family) list(table, chain string) (rules []string, exists bool, err error) {
	lines, err := f.ipt.List(table, chain)
	// Exit status 1 is the wrong argument: no such chain. Others are a kernel or a lock that does not answer.
	if e := (*iptables.Error)(nil); errors.As(err, &e) && e.ExitStatus() == 1 {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, fmt.Errorf("list chain %s of table %s: %w", chain, table, err)
	}
	for _, line := range lines {
		if rule, ok := strings.CutPrefix(line, "-A "+chain+" "); ok {
			rules = append(rules, rule)
		}
	}
	return rules, true, nil
}

// change runs iptables-restore with a script.
func (f *family) change(script string) error {
	if script == "" {
		return nil
	}
	f.declared = true
	cmd := exec.Command(f.restore, "--noflush", "--wait", strconv.Itoa(lockWait))
	cmd.Stdin = strings.NewReader(script)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("iptables-restore: %w: %s", err, strings.TrimSpace(stderr.String()))
	}
	return nil
}
