package rights

import (
	"errors"
	"io"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestSendAndReceive(t *testing.T) {
	a, f, err := Pair()
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	b, err := Conn(f)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	f.Close()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if err := Send(a, map[string]int{"n": 7}, int(w.Fd())); err != nil {
		t.Fatal(err)
	}
	w.Close()
	if err := Send(a, "second"); err != nil {
		t.Fatal(err)
	}
	var m map[string]int
	fds, err := Receive(b, &m)
	if err != nil || m["n"] != 7 || len(fds) != 1 {
		t.Fatalf("received %v with %d descriptors, %v", m, len(fds), err)
	}
	unix.Write(fds[0], []byte("x"))
	unix.Close(fds[0])
	if got, err := io.ReadAll(r); err != nil || string(got) != "x" {
		t.Errorf("through the descriptor: %q, %v", got, err)
	}
	var s string
	if fds, err := Receive(b, &s); err != nil || s != "second" || len(fds) != 0 {
		t.Errorf("received %q with %d descriptors, %v", s, len(fds), err)
	}
	if err := Send(a, strings.Repeat("x", maxMessage)); err == nil {
		t.Error("a message that is too long was sent")
	}
	var n int
	Send(a, "no number", 0)
	if _, err := Receive(b, &n); err == nil {
		t.Error("a text was received as a number")
	}
	a.Close()
	if _, err := Receive(b, &s); !errors.Is(err, io.EOF) {
		t.Errorf("after the other end closed: %v", err)
	}
}
