package gateway

import (
	"bufio"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/usernet/usernet/vsock/publish"
)

// counting has its connections as those of a guest are.
type counting struct {
	net.Listener
	uncounted atomic.Int64
}

type counted struct {
	net.Conn
	of *counting
}

func (l *counting) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	return counted{c, l}, err
}

func (c counted) Uncount() { c.of.uncounted.Add(1) }

// A guest's streams of published ports do not use up what it may have of connections to the API; anything else does.
func TestInsideStreamsAreNotCounted(t *testing.T) {
	c := fromArgs(t, "-ssh-port -1")
	c.Log = slog.New(slog.DiscardHandler)
	g, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	defer g.net.Close()
	defer g.published.Close()
	listening, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := &counting{Listener: listening}
	srv := &http.Server{Handler: g.inside()}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	defer func() {
		srv.Close()
		<-served
	}()
	secret := "none"
	for _, tt := range []struct {
		path      string
		status    int
		uncounted int64
	}{
		{publish.StreamPath, http.StatusForbidden, 0},
		{publish.SessionPath, http.StatusSwitchingProtocols, 0},
		{publish.StreamPath, http.StatusSwitchingProtocols, 1},
		{"/services/forwarder/all", http.StatusOK, 1},
	} {
		conn, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		method, upgrade := "GET", ""
		if strings.HasPrefix(tt.path, "/usernet/") {
			method, upgrade = "POST", "Connection: Upgrade\r\nUpgrade: "+publish.Protocol+"\r\n"
		}
		fmt.Fprintf(conn, "%s %s HTTP/1.1\r\nHost: usernet\r\n%sUsernet-Guest: %032d\r\nUsernet-Secret: %s\r\n\r\n", method, tt.path, upgrade, 1, secret)
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatal(err)
		}
		if s := resp.Header.Get("Usernet-Secret"); s != "" {
			secret = s
		}
		if n := l.uncounted.Load(); resp.StatusCode != tt.status || n != tt.uncounted {
			t.Errorf("%s: %s, %d connections do not count; want %d, %d", tt.path, resp.Status, n, tt.status, tt.uncounted)
		}
	}
}
