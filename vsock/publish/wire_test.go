package publish

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/vsock/proxy"
)

// The answer to an upgrade is read to its last byte, whatever follows at once.
func TestReadHead(t *testing.T) {
	const rest = "\r\n\r\n\x00\r\nQUIT\n!!" // as a PROXY header begins
	for _, head := range []string{
		"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: " + Protocol + "\r\n\r\n",
		"HTTP/1.1 101 \r\nConnection:upgrade\r\nUpgrade: " + Protocol + "\r\n\r\n",
		"HTTP/1.1 101 X\r\nConnection: keep-alive, Upgrade\r\nUpgrade: " + Protocol + "\r\nX: \r\nY: \r\n\r\n",
	} {
		r := strings.NewReader(head + rest)
		got, err := readHead(r)
		if err != nil || string(got) != head {
			t.Errorf("%q, %v, want %q", got, err, head)
		}
		if _, err := parseAnswer(got, r); err != nil {
			t.Error(err)
		}
		if left, _ := io.ReadAll(r); string(left) != rest {
			t.Errorf("%q is left, want %q", left, rest)
		}
	}
}

func TestAnswersThatAreNone(t *testing.T) {
	const field = "HTTP/1.1 101 Switching Protocols\r\nDate: Sat, 21 Nov 2026 12:00:00 GMT\r\n"
	for _, row := range []struct{ answer, want string }{
		{"", "answer: EOF"},
		{"HTTP/1.1 200 OK\r\n", "answer: unexpected EOF"},
		{field + "\r\n", "answer: 101 to something else than " + Protocol},
		{field + "Connection: Upgrade\r\nUpgrade: usernet-ports/2\r\n\r\n", "answer: 101 to something else than " + Protocol},
		{"HTTP/1.1 404 Not Found\r\nContent-Type: text/plain\r\nContent-Length: 10\r\n\r\nnot found\n", "the gateway there is none that publishes ports for usernet"},
		{"HTTP/1.1 503 Service Unavailable\r\nContent-Type: text/plain\r\nContent-Length: 9\r\n\r\ntoo many\n", "too many"},
		{"HTTP/1.1 503 Service Unavailable\r\nContent-Type: text/html\r\nContent-Length: 9\r\n\r\n<p>\n</p>\n", "503 Service Unavailable"},
		{"SSH-2.0-OpenSSH_9.9 and quite a lot more than is needed to fill the head\r\n\r\n", "answer: malformed HTTP "},
		{field + strings.Repeat("A: b\r\n", 2000), "answer: its head is longer than 8192 bytes"},
	} {
		r := strings.NewReader(row.answer)
		head, err := readHead(r)
		if err == nil {
			_, err = parseAnswer(head, r)
		}
		if err == nil || !strings.HasPrefix(err.Error(), row.want) {
			t.Errorf("%.60q: %v, want %q", row.answer, err, row.want)
		}
	}
}

func TestRequests(t *testing.T) {
	g := newGateway(t, ServerConfig{})
	for _, row := range []struct {
		request string
		status  int
	}{
		{"GET /usernet/session HTTP/1.1\r\nHost: x\r\n\r\n", 405},
		{"POST /usernet/other HTTP/1.1\r\nHost: x\r\n\r\n", 404},
		{"POST /usernet/session HTTP/1.1\r\nHost: x\r\n\r\n", 426},
		{"POST /usernet/session HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: usernet-ports/2\r\n\r\n", 426},
		{"POST /usernet/session HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: usernet-ports/1\r\nContent-Length: 1\r\n\r\nx", 400},
		{"POST /usernet/session HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: usernet-ports/1\r\n\r\n", 400},
		{"POST /usernet/session HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: usernet-ports/1\r\nUsernet-Guest: 12\r\n\r\n", 400},
		{"POST /usernet/stream HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: usernet-ports/1\r\n\r\n", 403},
		{"POST /usernet/stream HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: usernet-ports/1\r\nUsernet-Secret: " + newNumber() + "\r\n\r\n", 403},
	} {
		conn, err := g.dial(soon(t))
		if err != nil {
			t.Fatal(err)
		}
		conn.SetDeadline(time.Now().Add(within))
		io.WriteString(conn, row.request)
		res, err := http.ReadResponse(bufio.NewReader(conn), nil)
		conn.Close()
		if err != nil || res.StatusCode != row.status {
			t.Errorf("%.80q: %v, %v, want %d", row.request, res, err, row.status)
		}
	}
}

// The guest may write on before it has the answer: a session's lines, and what it says on a stream.
func TestEarlyBytes(t *testing.T) {
	g := newGateway(t, ServerConfig{})
	request := func(path, field, rest string) (net.Conn, *bufio.Reader, *http.Response) {
		t.Helper()
		conn, err := g.dial(soon(t))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		conn.SetDeadline(time.Now().Add(within))
		io.WriteString(conn, "POST "+path+" HTTP/1.1\r\nHost: usernet\r\nConnection: Upgrade\r\nUpgrade: "+Protocol+"\r\n"+field+"\r\n\r\n"+rest)
		r := bufio.NewReader(conn)
		res, err := http.ReadResponse(r, nil)
		if err != nil || res.StatusCode != 101 {
			t.Fatalf("%v, %v", res, err)
		}
		return conn, r, res
	}
	_, lines, res := request(SessionPath, guestHeader+": "+newNumber(), `{"op":"publish","id":7,"proto":"tcp","addr":"","port":8080}`+"\n"+`{"op":"pi`)
	if line, err := lines.ReadString('\n'); line != `{"id":7,"port":8080}`+"\n" {
		t.Fatalf("answer %q, %v", line, err)
	}
	_, stream, _ := request(StreamPath, secretHeader+": "+res.Header.Get(secretHeader), "early")
	client := dialTCP(t, "127.0.0.1:8080")
	b := make([]byte, 5)
	if _, err := io.ReadFull(client, b); err != nil || string(b) != "early" {
		t.Errorf("the client reads %q, %v", b, err)
	}
	h, err := proxy.Read(stream)
	if err != nil || h.Client.String() != client.LocalAddr().String() {
		t.Errorf("header %+v, %v", h, err)
	}
}

// Whatever a guest says in its session, others have theirs.
func TestLyingGuest(t *testing.T) {
	g := newGateway(t, ServerConfig{})
	c, _ := g.guest(nil)
	s := newServer(t)
	mustPublish(t, c, tcp(8080), s.handle)
	liar := NewClient(ClientConfig{Dial: g.dial, Log: testLog(t)})
	for _, text := range []string{
		"no JSON\n", "{}{}\n", "[]\n", `{"id":-1}` + "\n", `{"op":"publish","id":1,"port":70000}` + "\n", `{"op":"publish","id":1,"addr":"300.1.1.1"}` + "\n",
		strings.Repeat("x", 10000), strings.Repeat(" ", maxLine) + "\n", "\n",
	} {
		l, err := liar.connect(soon(t))
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(l.lines.conn, text)
		if m, err := l.lines.read(); err == nil {
			t.Errorf("%.40q is answered: %+v", text, m)
		}
		l.lines.conn.Close()
	}
	l, err := liar.connect(soon(t))
	if err != nil {
		t.Fatal(err)
	}
	defer l.lines.conn.Close()
	for _, row := range []struct {
		q    message
		want string
	}{
		{message{Op: "dance", ID: 1}, `invalid: operation "dance"`},
		{message{Op: opPublish, ID: 2, Proto: "icmp"}, `invalid: protocol "icmp"`},
		{message{Op: opPublish, ID: 3, Proto: usernet.TCP, Port: 90, End: 80}, "invalid: the range 90-80"},
		{message{Op: opPublish, ID: 4, Proto: usernet.TCP, Port: 8080}, "port 8080 is taken on the host: a guest has published it"},
		{message{Op: opUnpublish, ID: 5, Proto: usernet.TCP, Port: 8080}, ""},
		{message{Op: opPublish, ID: 1<<64 - 1, Proto: usernet.UDP, Port: 8080}, ""},
	} {
		if a := ask(t, l, row.q); a.Error != row.want {
			t.Errorf("%+v: %q, want %q", row.q, a.Error, row.want)
		}
	}
	talk(t, "127.0.0.1:8080", "x")
}

func TestDatagrams(t *testing.T) {
	var wire []byte
	want := [][]byte{[]byte("a"), {}, bytes.Repeat([]byte("b"), MaxDatagram), []byte("c")}
	for _, d := range want {
		wire = AppendDatagram(wire, d)
	}
	if long := AppendDatagram(nil, make([]byte, MaxDatagram+1)); len(long) != MaxDatagram+2 {
		t.Errorf("what is too long becomes %d bytes", len(long))
	}
	r, b := bufio.NewReader(bytes.NewReader(wire)), make([]byte, MaxDatagram)
	for _, d := range want {
		n, err := ReadDatagram(r, b)
		if err != nil || !bytes.Equal(b[:n], d) {
			t.Errorf("%d bytes, %v, want %d", n, err, len(d))
		}
	}
	if _, err := ReadDatagram(r, b); err != io.EOF {
		t.Error(err)
	}
	for cut := 1; cut < 3; cut++ {
		if _, err := ReadDatagram(bufio.NewReader(bytes.NewReader([]byte{0, 2, 1}[:cut])), b); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("cut after %d: %v", cut, err)
		}
	}
}

func FuzzLine(f *testing.F) {
	f.Add([]byte(`{"op":"publish","id":1,"proto":"tcp","addr":"::1","port":8080,"end":8090}` + "\n"))
	f.Add([]byte(`{"id":1,"error":"no","taken":true}`))
	f.Add([]byte("[1,2"))
	x := newSession(NewServer(ServerConfig{Limits: Limits{Ports: 1}}), "", "fuzz")
	x.ports[key{}] = nil // no port is opened: the limit is reached
	f.Fuzz(func(t *testing.T, line []byte) {
		m, err := decode(line)
		if err != nil {
			return
		}
		if a := x.answer(m); a.ID != m.ID || m.Op != opUnpublish && a.Error == "" {
			t.Errorf("%q is answered %+v", line, a)
		}
	})
}

func FuzzAnswer(f *testing.F) {
	f.Add([]byte("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: "+Protocol+"\r\n\r\n"), []byte("rest"))
	f.Add([]byte("HTTP/1.1 403 Forbidden\r\nContent-Length: 1000000000\r\nX: yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy\r\n\r\nno"), []byte{})
	f.Fuzz(func(t *testing.T, head, rest []byte) {
		r := bytes.NewReader(append(bytes.Clone(head), rest...))
		got, err := readHead(r)
		if err != nil {
			return
		}
		if !bytes.HasSuffix(got, []byte("\r\n\r\n")) || len(got) > shortest && bytes.Contains(got[shortest-4:len(got)-1], []byte("\r\n\r\n")) {
			t.Fatalf("%q is not a head", got)
		}
		left := r.Len()
		if _, err := parseAnswer(got, r); err == nil && r.Len() != left {
			t.Errorf("%d bytes behind the head are lost", left-r.Len())
		}
	})
}

func FuzzDatagram(f *testing.F) {
	f.Add([]byte{0, 1, 'x', 0, 0, 1, 0})
	f.Fuzz(func(t *testing.T, wire []byte) {
		r, b := bufio.NewReader(bytes.NewReader(wire)), make([]byte, MaxDatagram)
		var again []byte
		for {
			n, err := ReadDatagram(r, b)
			if err != nil {
				if !bytes.HasPrefix(wire, again) || (err == io.EOF) != (len(again) == len(wire)) {
					t.Errorf("%d bytes of %d, %v", len(again), len(wire), err)
				}
				return
			}
			again = AppendDatagram(again, b[:n])
		}
	})
}

// What the kernel says of a datagram, and what is said of the answer to it.
func FuzzDestination(f *testing.F) {
	for _, v6 := range []bool{false, true} {
		for _, a := range []string{"192.0.2.1", "2001:db8::1", "fe80::1"} {
			f.Add(v6, destination{v4: !v6, v6: v6}.control(netip.MustParseAddr(a)))
		}
	}
	f.Fuzz(func(t *testing.T, v6 bool, oob []byte) {
		d := destination{v4: !v6, v6: v6}
		local, ok := d.parse(oob)
		if ok && local.IsValid() && (local.Is4() == v6 || local.IsMulticast()) {
			t.Errorf("it came in for %s", local)
		}
		d.control(local)
	})
}

// Whatever a request says, without a connection that can be upgraded nothing comes of it.
func FuzzRequest(f *testing.F) {
	f.Add("POST", SessionPath, "Upgrade", Protocol, "0123456789abcdef0123456789abcdef", "", "")
	f.Add("POST", StreamPath, "keep-alive, upgrade", Protocol, "", "0123456789abcdef0123456789abcdef", "")
	f.Add("GET", "/usernet/", "", "", "", "", "{}")
	s := NewServer(ServerConfig{Log: slog.New(slog.DiscardHandler)})
	f.Cleanup(func() { s.Close() })
	f.Fuzz(func(t *testing.T, method, path, connection, upgrade, guest, secret, body string) {
		r := httptest.NewRequestWithContext(t.Context(), "POST", "/", strings.NewReader(body))
		r.Method, r.URL.Path = method, path
		for k, v := range map[string]string{"Connection": connection, "Upgrade": upgrade, guestHeader: guest, secretHeader: secret} {
			r.Header.Set(k, v)
		}
		w := httptest.NewRecorder()
		s.ServeHTTP(w, r)
		if w.Code < 400 || w.Code > 503 {
			t.Errorf("status %d", w.Code)
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		if len(s.sessions) != 0 {
			t.Error("there is a session")
		}
	})
}

func ExampleAppendDatagram() {
	fmt.Printf("%q\n", AppendDatagram(nil, []byte("hello")))
	// Output: "\x00\x05hello"
}
