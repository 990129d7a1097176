package control

import (
	"context"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/nettest"
)

// serveRights runs f for every request to the socket that it returns.
func serveRights(t *testing.T, f func(*os.File)) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	unix, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	l := rightsListener{unix}
	srv := &http.Server{ConnContext: l.ConnContext, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		f(passed(r.Context()))
		io.WriteString(w, "{}")
	})}
	done := make(chan struct{})
	go func() { defer close(done); srv.Serve(l) }()
	t.Cleanup(func() { srv.Close(); <-done })
	return path
}

func TestDescriptorComesWithItsRequest(t *testing.T) {
	nettest.NoLeaks(t)
	want, err := os.Create(filepath.Join(t.TempDir(), "f"))
	if err != nil {
		t.Fatal(err)
	}
	defer want.Close()
	came := make(chan *os.File, 2)
	path := serveRights(t, func(f *os.File) { came <- f })
	c := NewClient(path)
	big := make([]byte, 1<<20) // more than one read of the server's
	if err := c.passing(want).call(context.Background(), http.MethodPost, "x", big, nil); err != nil {
		t.Fatal(err)
	}
	got := <-came
	if got == nil {
		t.Fatal("no descriptor came")
	}
	defer got.Close()
	a, _ := want.Stat()
	if b, err := got.Stat(); err != nil || !os.SameFile(a, b) {
		t.Errorf("another file came: %v, %v", b, err)
	}
	if flags, err := unix.FcntlInt(got.Fd(), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Error("children would inherit the descriptor")
	}
	if err := c.call(context.Background(), http.MethodGet, "x", nil, nil); err != nil {
		t.Fatal(err)
	}
	if none := <-came; none != nil {
		none.Close()
		t.Error("a descriptor came with a request that had none")
	}
}

// What nobody takes is closed with the connection, and a connection cannot bring any number.
func TestUnwantedDescriptorsAreClosed(t *testing.T) {
	nettest.NoLeaks(t)
	served := make(chan struct{}, 1)
	path := serveRights(t, func(f *os.File) {
		f.Close()
		served <- struct{}{}
	})
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	null, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	fds := make([]int, 100)
	for i := range fds {
		fds[i] = int(null.Fd())
	}
	for _, part := range []string{"GET / HTTP/1.1\r\n", "Host: x\r\n", "\r\n"} {
		if _, _, err := conn.(*net.UnixConn).WriteMsgUnix([]byte(part), unix.UnixRights(fds...), nil); err != nil {
			t.Fatal(err)
		}
	}
	<-served
}
