package doctor

import (
	"os/exec"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
)

func TestWrite(t *testing.T) {
	all := []Finding{
		{Group: "kernel", Name: "TUN device", Status: Missing, Detail: "there is none, so nothing that a container sends would get anywhere.", Fix: "sudo modprobe tun", essential: true},
		{Group: "kernel", Name: "fast path", Status: OK, Detail: "there."},
		{Group: "rights", Name: "ping", Status: Warning, Detail: "no.", Fix: "echo " + strings.Repeat("eighty ", 11) + "columns"},
		{Group: "rights", Name: "low ports", Status: Info, Detail: "from 1024."},
	}
	want := `kernel
  missing  TUN device        there is none, so nothing that a container sends
                             would get anywhere.
           $ sudo modprobe tun
  OK       fast path         there.

rights
  warning  ping              no.
           $ echo eighty eighty eighty eighty eighty eighty eighty eighty \
             eighty eighty eighty columns
  info     low ports         from 1024.

Usermode networks cannot work for you yet: see what is missing above. Worth a
look: one warning.
`
	var b strings.Builder
	if err := Write(&b, all, false); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, b.String()); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	var painted strings.Builder
	if err := Write(&painted, all, true); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(painted.String(), "\x1b[31mmissing\x1b[0m  TUN device        there") {
		t.Errorf("no red: %q", painted.String())
	}
	all[0].Status = Warning
	b.Reset()
	if err := Write(&b, all, false); err != nil || !strings.HasSuffix(b.String(), "\nUsermode networks work for you. Worth a look: 2 warnings.\n") {
		t.Errorf("%v: %s", err, b.String())
	}
}

// What this machine's report is, it fits.
func TestColumns(t *testing.T) {
	var b strings.Builder
	if err := Write(&b, Examine(t.Context(), testConfig()), false); err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(b.String()) {
		if utf8.RuneCountInString(strings.TrimSuffix(line, "\n")) > width {
			t.Errorf("too long: %s", line)
		}
	}
	for _, c := range checks {
		if len(c.name) > textCol-nameCol-2 {
			t.Errorf("the name %q is too long", c.name)
		}
	}
}

// Commands are for the shell, also where they were broken.
func TestFixesAreCommands(t *testing.T) {
	for _, command := range []string{
		`sudo sysctl -w net.ipv4.ping_group_range="0 2147483647"`,
		"sudo sh -c 'for l in unb0123456789ab un0123456789ab un0123456789ac un0123456789ad; do ip link delete $l; done'; sudo nft delete table inet " + hostTable,
	} {
		var b strings.Builder
		writeFix(&b, command)
		script := strings.Replace(b.String(), "$ ", "  ", 1)
		if out, err := exec.Command("sh", "-n", "-c", script).CombinedOutput(); err != nil {
			t.Errorf("%s: %v: %s", script, err, out)
		}
	}
}
