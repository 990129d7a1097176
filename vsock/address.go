package vsock

import (
	"errors"
	"fmt"
	"math"
	"net"
	"net/url"
	"runtime"
	"slices"
	"strconv"
	"strings"
)

// CIDs with a meaning (vsock(7)).
const (
	cidLocal = 1
	cidHost  = 2
	cidAny   = math.MaxUint32 // VMADDR_CID_ANY
	portAny  = math.MaxUint32 // VMADDR_PORT_ANY
)

// Addr is where to dial or to listen, made by Parse. Addresses can be compared by ==; the zero value is none.
type Addr struct {
	kind        *scheme // a row of the table; nil: no address
	cid         uint32  // vsock
	port        uint32  // vsock, hybrid, hyperkit
	path        string  // of the URL: unix, hybrid, hyperkit; vsock: what is said behind the port
	host        string  // tcp: with the port; fd: the name
	vm, service GUID    // hvsock
}

// parts are a URL's, as the schemes want them: without user, query and fragment, which none has.
type parts struct {
	host, path, opaque string
}

// Parse reads an address from its URL (see Schemes). It looks at the text only: whether the system can use the address
// is found out by Dial and Listen, so that a configuration can be checked anywhere.
func Parse(text string) (Addr, error) {
	a, err := parse(text)
	if err != nil {
		return Addr{}, fmt.Errorf("address %q: %w", text, err)
	}
	return a, nil
}

func parse(text string) (a Addr, err error) {
	u, err := url.Parse(text)
	if err != nil {
		if inner, ok := errors.AsType[*url.Error](err); ok {
			err = inner.Err
		}
		return Addr{}, err
	}
	switch {
	case u.User != nil:
		return Addr{}, errors.New("there is no place for a user")
	case u.RawQuery != "" || u.ForceQuery:
		return Addr{}, errors.New("there is no place for a query")
	case strings.Contains(text, "#"):
		return Addr{}, errors.New("there is no place for a fragment")
	case strings.ContainsRune(u.Path+u.Host, 0):
		return Addr{}, errors.New("there is a zero byte in it")
	}
	p := parts{host: u.Host, path: u.Path, opaque: u.Opaque}
	name := alias(u.Scheme, &p)
	i := slices.IndexFunc(schemes, func(s scheme) bool { return s.Name == name })
	if i < 0 {
		return Addr{}, unknown(name)
	}
	a.kind = &schemes[i]
	if p.opaque != "" && name != "fd" {
		return Addr{}, fmt.Errorf("want %s", a.kind.Form)
	}
	if err := a.kind.parse(&a, p); err != nil {
		return Addr{}, err
	}
	return a, nil
}

// alias turns gvproxy's spellings into the schemes that they mean: vsock://null:PORT/DIR on macOS, vsock://SERVICE-GUID on
// Windows.
func alias(name string, p *parts) string {
	if name != "vsock" {
		return name
	}
	if port, ok := strings.CutPrefix(p.host, "null:"); ok {
		*p = parts{path: p.path + ":" + port}
		return "hyperkit"
	}
	if _, err := ParseGUID(p.host); err == nil && p.path == "" {
		*p = parts{host: "wildcard", path: "/" + p.host}
		return "hvsock"
	}
	return name
}

func unknown(name string) error {
	var forms []string
	for _, s := range schemes {
		forms = append(forms, s.Form)
	}
	if name == "" {
		return fmt.Errorf("the scheme is missing: want %s", strings.Join(forms, ", "))
	}
	return fmt.Errorf("unknown scheme %s: want %s", name, strings.Join(forms, ", "))
}

// String returns the URL, in the spelling that the scheme's Form has; Parse reads it back as the same address.
func (a Addr) String() string {
	if a.kind == nil {
		return ""
	}
	return a.kind.write(a)
}

// Scheme is the name of the address's row in Schemes, "" for the zero value.
func (a Addr) Scheme() string {
	if a.kind == nil {
		return ""
	}
	return a.kind.Name
}

// RequestPath is the path behind the port in vsock://2:1024/connect, "" if there is none. Dial and Listen do not look
// at it; to gvproxy's clients it says what to ask for by HTTP.
func (a Addr) RequestPath() string {
	if a.Scheme() != "vsock" {
		return ""
	}
	return a.path
}

func parseVsock(a *Addr, p parts) (err error) {
	cid, port, ok := strings.Cut(p.host, ":")
	if !ok {
		return errors.New("the port is missing: want vsock://CID:PORT")
	}
	if a.cid, err = parseCID(cid); err != nil {
		return err
	}
	if a.port, err = parsePort(port, portAny-1); err != nil {
		return err
	}
	a.path = p.path
	return nil
}

func parseCID(s string) (uint32, error) {
	switch s {
	case "":
		return cidAny, nil
	case "local":
		return cidLocal, nil
	case "host":
		return cidHost, nil
	}
	cid, err := strconv.ParseUint(s, 10, 32)
	if err != nil || cid == cidAny {
		return 0, fmt.Errorf("CID %q: want a number, host, local, or nothing for every CID", s)
	}
	return uint32(cid), nil
}

func writeVsock(a Addr) string {
	cid := ""
	if a.cid != cidAny {
		cid = strconv.FormatUint(uint64(a.cid), 10)
	}
	return (&url.URL{Scheme: "vsock", Host: fmt.Sprintf("%s:%d", cid, a.port), Path: a.path}).String()
}

func parsePort(s string, most uint32) (uint32, error) {
	n, err := strconv.ParseUint(s, 10, 32)
	if err != nil || uint32(n) > most {
		return 0, fmt.Errorf("port %q: want a number up to %d", s, most)
	}
	return uint32(n), nil
}

func parseUnix(a *Addr, p parts) error {
	if err := checkPath(p); err != nil {
		return err
	}
	a.path = p.path
	return fits(a.file(a.path))
}

func writeUnix(a Addr) string { return (&url.URL{Scheme: "unix", Path: a.path}).String() }

// checkPath refuses unix://run/x.sock, which has a host and no directory /run, and what cannot be a file.
func checkPath(p parts) error {
	switch {
	case p.host != "":
		return fmt.Errorf("%q is a host there: an absolute path has three slashes before it", p.host)
	case strings.Trim(p.path, "/") == "":
		return errors.New("the path is missing")
	case p.path[0] != '/':
		return fmt.Errorf("the path %s is not absolute", p.path)
	case strings.HasSuffix(p.path, "/"):
		return errors.New("the path is that of a directory")
	}
	return nil
}

// fits tells whether a path has room in struct sockaddr_un.
func fits(path string) error {
	if len(path) > maxPath {
		return fmt.Errorf("%s: a path of a unix socket has %d bytes at most, this one %d", path, maxPath, len(path))
	}
	return nil
}

// parsePathPort reads the last colon's right side as the port; paths may have colons, too.
func parsePathPort(a *Addr, p parts) (err error) {
	i := strings.LastIndexByte(p.path, ':')
	if i < 0 {
		return fmt.Errorf("the port is missing: want %s", a.kind.Form)
	}
	if a.port, err = parsePort(p.path[i+1:], portAny-1); err != nil {
		return err
	}
	if a.port == 0 {
		return errors.New("port 0 is nobody's")
	}
	p.path = p.path[:i]
	if a.kind.Name == "hyperkit" {
		p.path = strings.TrimRight(p.path, "/")
	}
	if err := checkPath(p); err != nil {
		return err
	}
	a.path = p.path
	if a.kind.Name == "hyperkit" {
		return fits(hyperKitCalls(*a))
	}
	return fits(hybridCalls(*a))
}

func writePathPort(a Addr) string {
	return (&url.URL{Scheme: a.kind.Name, Path: fmt.Sprintf("%s:%d", a.path, a.port)}).String()
}

// file is a path of a URL as the system has it: on Windows, /c:/run/x is c:/run/x.
func (a Addr) file(path string) string { return localPath(runtime.GOOS, path) }

func localPath(system, path string) string {
	if system == "windows" && len(path) >= 3 && path[2] == ':' {
		return path[1:]
	}
	return path
}

func parseTCP(a *Addr, p parts) error {
	if p.path != "" {
		return errors.New("there is no place for a path")
	}
	host, port, err := net.SplitHostPort(p.host)
	if err != nil {
		return errors.New("want tcp://HOST:PORT")
	}
	n, err := parsePort(port, math.MaxUint16)
	if err != nil {
		return err
	}
	a.host = net.JoinHostPort(host, strconv.FormatUint(uint64(n), 10))
	return nil
}

func writeTCP(a Addr) string { return (&url.URL{Scheme: "tcp", Host: a.host}).String() }

// parseFD takes fd:NAME, and fd://NAME as Docker writes it.
func parseFD(a *Addr, p parts) error {
	name := p.opaque
	if name == "" {
		name = p.host
	}
	if p.path != "" || strings.ContainsAny(name, ":/%[]") {
		return errors.New("want fd:NAME")
	}
	a.host = name
	return nil
}

func writeFD(a Addr) string { return "fd:" + a.host }
