//go:build linux

package main

import (
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/doctor"
)

// The test binary is also the program: the one that makes the experiments, and one for other users.
func init() {
	if len(os.Args) > 1 && os.Args[1] == "doctor" {
		p := &program{stdout: os.Stdout, stderr: os.Stderr}
		os.Exit(p.main(context.Background(), os.Args[1:]))
	}
}

func TestDoctor(t *testing.T) {
	nowhere := filepath.Join(t.TempDir(), "none")
	code, stdout, stderr := runProgram(t, t.Context(), "doctor", "--control-socket", nowhere)
	if code != 0 || stderr != "" || !strings.Contains(stdout, "\nUsermode networks work for you.") {
		t.Errorf("exit status %d, %q:\n%s", code, stderr, stdout)
	}
	if !strings.Contains(strings.Join(strings.Fields(stdout), " "), "none answers at "+nowhere) {
		t.Errorf("the daemon's absence is not told:\n%s", stdout)
	}
}

func TestDoctorJSON(t *testing.T) {
	bad := filepath.Join(t.TempDir(), "usernet.conf")
	if err := os.WriteFile(bad, []byte("mood = \"good\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	code, stdout, stderr := runProgram(t, t.Context(), "doctor", "--json", "--config", bad)
	if code != 0 || stderr != "" {
		t.Errorf("exit status %d, %q", code, stderr)
	}
	var found []map[string]string
	if err := json.Unmarshal([]byte(stdout), &found); err != nil {
		t.Fatalf("%v: %s", err, stdout)
	}
	faulty := false
	for _, f := range found {
		if len(f) != 5 || f["name"] == "" || f["detail"] == "" ||
			!slices.Contains([]string{"kernel", "rights", "engines", "usernet"}, f["group"]) ||
			!slices.Contains([]string{"ok", "warning", "missing", "info"}, f["status"]) {
			t.Errorf("finding %v", f)
		}
		if f["name"] == "configuration" {
			faulty = f["status"] == "missing" && strings.Contains(f["detail"], "unknown setting mood") && f["fix"] == "sudoedit "+bad
		}
	}
	if !faulty {
		t.Errorf("the fault in the configuration is not told: %s", stdout)
	}
}

// A user who cannot have usermode networks learns it from the exit status, too.
func TestDoctorFails(t *testing.T) {
	closed := filepath.Join(t.TempDir(), "tun")
	if err := os.WriteFile(closed, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(closed, "/dev/net/tun", "none", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount("/dev/net/tun", 0)
	cmd := exec.Command("/proc/self/exe", "doctor")
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState.ExitCode() != 1 || !strings.Contains(string(out), "$ sudo chmod 0666 /dev/net/tun\n") ||
		!strings.Contains(string(out), "\nUsermode networks cannot work for you yet") {
		t.Errorf("%v:\n%s", err, out)
	}
}

func TestDoctorRefuses(t *testing.T) {
	for _, tt := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"doctor", doctor.ProbeCommand}, 1, "for usernet doctor itself"},
		{[]string{"doctor", "now"}, 2, `unexpected argument "now"`},
	} {
		if code, stdout, stderr := runProgram(t, t.Context(), tt.args...); code != tt.code || stdout != "" || !strings.Contains(stderr, tt.want) {
			t.Errorf("%q: exit status %d, %q, %q", tt.args, code, stdout, stderr)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if code, stdout, _ := runProgram(t, ctx, "doctor"); code != 1 || stdout != "" {
		t.Errorf("cancelled: exit status %d, %q", code, stdout)
	}
}

// Reports into a file have no colours, nor have those for people who want none.
func TestColourful(t *testing.T) {
	terminal, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer terminal.Close()
	t.Setenv("TERM", "xterm")
	if !colourful(terminal) {
		t.Error("no colours on a terminal")
	}
	if colourful(new(strings.Builder)) {
		t.Error("colours where there is no terminal")
	}
	t.Setenv("NO_COLOR", "1")
	if colourful(terminal) {
		t.Error("colours in spite of NO_COLOR")
	}
}
