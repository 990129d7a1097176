// Package config turns text into checked values: the options of a network, the port specifications of a command line
// and the daemon's file. It does no I/O and changes nothing; what it refuses wraps usernet.ErrInvalid.
package config

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/usernet/usernet"
)

const prefix = "usernet."

// option is one option of a network.
type option struct {
	docker []string     // what Docker's bridge driver calls it
	only   usernet.Mode // the kind of network that it means something on; "" means both
	single bool         // names something that only one network can have, so it cannot be a default of the daemon
	set    func(o *usernet.Options, value string) error
}

func (o option) fits(m usernet.Mode) bool { return o.only == "" || o.only == m }

// options has every option by its short name. mode is in it for its name; it is read before the others.
var options = map[string]option{
	"mode":         {set: setMode},
	"mtu":          {docker: []string{"com.docker.network.driver.mtu"}, set: setMTU},
	"icc":          {docker: []string{"com.docker.network.bridge.enable_icc"}, set: boolean(func(o *usernet.Options) *bool { return &o.ICC })},
	"host_binding": {docker: []string{"com.docker.network.bridge.host_binding_ipv4"}, set: setHostBinding},
	"iface_prefix": {docker: []string{"com.docker.network.container_iface_prefix"}, set: setIfacePrefix},
	"fastpath":     {only: usernet.Usermode, set: setFastPath},
	"subnet":       {single: true, set: setSubnets},
	"gateway":      {single: true, set: setGateways},

	"bridge": {docker: []string{"com.docker.network.bridge.name"}, only: usernet.Bridge, single: true, set: setBridgeName},
	"masquerade": {docker: []string{"com.docker.network.bridge.enable_ip_masquerade"}, only: usernet.Bridge,
		set: boolean(func(o *usernet.Options) *bool { return &o.Masquerade })},
	"inhibit_ipv4": {docker: []string{"com.docker.network.bridge.inhibit_ipv4"}, only: usernet.Bridge,
		set: boolean(func(o *usernet.Options) *bool { return &o.InhibitHostIP })},
	"source_ipv4": {docker: []string{"com.docker.network.host_ipv4"}, only: usernet.Bridge, set: setSource4},
	"source_ipv6": {docker: []string{"com.docker.network.host_ipv6"}, only: usernet.Bridge, set: setSource6},
}

// engines are options that the engine obeys itself and passes on to every driver, whatever their value.
var engines = map[string]bool{
	"com.docker.network.enable_ipv4":          true,
	"com.docker.network.enable_ipv6":          true,
	"com.docker.network.advertise_addr_nmsgs": true,
	"com.docker.network.advertise_addr_ms":    true,
}

// unsupported are options of Docker's bridge driver that usernet does not have, with the one value, if any, that asks
// for what usernet does anyway.
var unsupported = map[string]string{
	"com.docker.network.bridge.gateway_mode_ipv4":       "nat",
	"com.docker.network.bridge.gateway_mode_ipv6":       "nat",
	"com.docker.network.bridge.trusted_host_interfaces": "",
	"com.docker.network.bridge.default_bridge":          "false",
}

// Names lists the short names of all options, sorted.
func Names() []string { return slices.Sorted(maps.Keys(options)) }

// Options checks the options of a network. Each may be written by its short name, with the prefix "usernet.", or as
// Docker's bridge driver calls it. What is not given takes its default: Usermode, with ICC, Masquerade and FastPath.
func Options(raw map[string]string) (usernet.Options, error) { return OptionsOver(nil, raw) }

// OptionsOver is Options with defaults for what raw does not give. A default that means nothing for the mode of the
// network is left out.
func OptionsOver(defaults, raw map[string]string) (usernet.Options, error) {
	values, err := Merge(defaults, raw)
	if err != nil {
		return usernet.Options{}, err
	}
	o := usernet.Options{Mode: usernet.Usermode, ICC: true, Masquerade: true, FastPath: true}
	if mode, given := values["mode"]; given {
		if err := setMode(&o, mode); err != nil {
			return usernet.Options{}, invalid("option mode=%.64s: %w", mode, err)
		}
	}
	if err := apply(&o, values); err != nil {
		return usernet.Options{}, err
	}
	return o, nil
}

// Merge returns the options by their short names, with those of defaults that raw does not give and that mean something
// for its mode: what OptionsOver would obey.
func Merge(defaults, raw map[string]string) (map[string]string, error) {
	below, err := canonical(defaults)
	if err != nil {
		return nil, fmt.Errorf("default options: %w", err)
	}
	values, err := canonical(raw)
	if err != nil {
		return nil, err
	}
	if _, given := values["mode"]; !given && below["mode"] != "" {
		values["mode"] = below["mode"]
	}
	mode := usernet.Mode(values["mode"])
	if mode == "" {
		mode = usernet.Usermode
	}
	for name, value := range below {
		if _, given := values[name]; !given && options[name].fits(mode) {
			values[name] = value
		}
	}
	return values, nil
}

func apply(o *usernet.Options, values map[string]string) error {
	// gateway needs what subnet says: last.
	names := slices.Sorted(maps.Keys(values))
	if i, found := slices.BinarySearch(names, "gateway"); found {
		names = append(slices.Delete(names, i, i+1), "gateway")
	}
	for _, name := range names {
		if !options[name].fits(o.Mode) {
			return invalid("option %s: it needs mode=%s", name, options[name].only)
		}
		if err := options[name].set(o, values[name]); err != nil {
			return invalid("option %s=%.64s: %w", name, values[name], err)
		}
	}
	defaultGateways(o.Subnets)
	return nil
}

// canonical returns the options by their short names.
func canonical(raw map[string]string) (map[string]string, error) {
	values := make(map[string]string)
	spelt := make(map[string]string)
	for _, key := range slices.Sorted(maps.Keys(raw)) {
		value := strings.TrimSpace(raw[key])
		if engines[key] {
			continue
		}
		if same, known := unsupported[key]; known {
			if value == same && same != "" {
				continue
			}
			return nil, invalid("option %s=%.64s: not supported", key, value)
		}
		name, known := shortName(key)
		if !known {
			return nil, unknown(key)
		}
		if other, twice := spelt[name]; twice && values[name] != value {
			return nil, invalid("options %s=%.64s and %s=%.64s: they are the same option", other, values[name], key, value)
		}
		spelt[name], values[name] = key, value
	}
	return values, nil
}

func shortName(key string) (string, bool) {
	name := strings.TrimPrefix(key, prefix)
	if _, known := options[name]; known {
		return name, true
	}
	for name, opt := range options {
		if slices.Contains(opt.docker, key) {
			return name, true
		}
	}
	return "", false
}

// unknown says that key is none of ours, which one was perhaps meant, and which there are.
func unknown(key string) error {
	hint := ""
	best := 3 // more typing errors than two are another word
	for _, name := range Names() {
		for _, spelling := range append([]string{name, prefix + name}, options[name].docker...) {
			if d := distance(key, spelling); d < best && 3*d <= len(spelling) {
				best, hint = d, fmt.Sprintf("did you mean %s? ", spelling)
			}
		}
	}
	return invalid("option %.64q: unknown; %sknown are %s", key, hint, strings.Join(Names(), ", "))
}

// distance is the number of letters to insert, delete, replace or swap with their neighbour to get from a to b (optimal
// string alignment). It does not look closely at what is far apart.
func distance(a, b string) int {
	if d := max(len(a)-len(b), len(b)-len(a)); d > 2 {
		return d
	}
	before, last := make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range last {
		last[j] = j
	}
	for i := range len(a) {
		row := make([]int, len(b)+1)
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			row[j+1] = min(last[j]+cost, last[j+1]+1, row[j]+1)
			if i > 0 && j > 0 && a[i] == b[j-1] && a[i-1] == b[j] {
				row[j+1] = min(row[j+1], before[j-1]+1)
			}
		}
		before, last = last, row
	}
	return last[len(b)]
}

func invalid(format string, args ...any) error {
	return fmt.Errorf("%w "+format, append([]any{usernet.ErrInvalid}, args...)...)
}

func setMode(o *usernet.Options, value string) error {
	switch m := usernet.Mode(value); m {
	case usernet.Usermode, usernet.Bridge:
		o.Mode = m
		return nil
	}
	return fmt.Errorf("want %s or %s", usernet.Usermode, usernet.Bridge)
}

// The bounds of an MTU: RFC 791 wants 68 bytes of every IPv4 link, and an IP packet's length has 16 bits. A network
// with IPv6 needs 1280 (RFC 8200, section 5), which Network checks.
const (
	minMTU  = 68
	minMTU6 = 1280
	maxMTU  = 65535
)

func setMTU(o *usernet.Options, value string) error {
	n, err := strconv.Atoi(value)
	if err != nil || n < minMTU || n > maxMTU {
		return fmt.Errorf("want a number of bytes from %d to %d", minMTU, maxMTU)
	}
	o.MTU = n
	return nil
}

func setFastPath(o *usernet.Options, value string) error {
	switch value {
	case "on":
		o.FastPath = true
	case "off":
		o.FastPath = false
	default:
		return fmt.Errorf("want on or off")
	}
	return nil
}

func boolean(field func(*usernet.Options) *bool) func(*usernet.Options, string) error {
	return func(o *usernet.Options, value string) error {
		b, err := strconv.ParseBool(value)
		if err != nil {
			return fmt.Errorf("want true or false")
		}
		*field(o) = b
		return nil
	}
}

func setBridgeName(o *usernet.Options, value string) error {
	o.BridgeName = value
	return linkName(value)
}

func setIfacePrefix(o *usernet.Options, value string) error {
	o.IfacePrefix = value
	if len(value) > maxLinkName-3 {
		return fmt.Errorf("want at most %d letters, to leave room for a number", maxLinkName-3)
	}
	return linkName(value)
}

// maxLinkName is IFNAMSIZ without the zero byte.
const maxLinkName = 15

// LinkName checks the name of a network interface: 1 to 15 printable ASCII characters, without what the kernel forbids
// (dev_valid_name) and without '%', which asks it to choose a number.
func LinkName(s string) error {
	if err := linkName(s); err != nil {
		return invalid("interface name %.64q: %w", s, err)
	}
	return nil
}

func linkName(s string) error {
	if s == "" || len(s) > maxLinkName {
		return fmt.Errorf("want 1 to %d letters", maxLinkName)
	}
	if s == "." || s == ".." {
		return fmt.Errorf("it is a directory")
	}
	for _, c := range []byte(s) {
		if c <= ' ' || c >= 0x7f || c == '/' || c == ':' || c == '%' {
			return fmt.Errorf("%q cannot be in it", c)
		}
	}
	return nil
}

func setHostBinding(o *usernet.Options, value string) (err error) {
	o.HostBinding, err = hostIP(value)
	return err
}

// HostIP checks an address of the host to listen on. An IPv4 address written as IPv6 comes back as IPv4.
func HostIP(s string) (netip.Addr, error) {
	a, err := hostIP(s)
	if err != nil {
		return netip.Addr{}, invalid("host address %.64q: %w", s, err)
	}
	return a, nil
}

func hostIP(s string) (netip.Addr, error) {
	a, err := netip.ParseAddr(s)
	if err != nil || a.Zone() != "" || a.IsMulticast() {
		return netip.Addr{}, fmt.Errorf("want an IP address of the host")
	}
	return a.Unmap(), nil
}

func setSource4(o *usernet.Options, value string) error {
	a, err := hostIP(value)
	if err != nil || !a.Is4() || a.IsUnspecified() || a.IsLoopback() {
		return fmt.Errorf("want an IPv4 address of the host")
	}
	o.Source4 = a
	return nil
}

func setSource6(o *usernet.Options, value string) error {
	a, err := hostIP(value)
	if err != nil || !a.Is6() || a.IsUnspecified() || a.IsLoopback() {
		return fmt.Errorf("want an IPv6 address of the host")
	}
	o.Source6 = a
	return nil
}
