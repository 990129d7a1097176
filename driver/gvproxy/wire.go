package gvproxy

import (
	"net"
	"net/netip"
	"reflect"
	"regexp"
	"slices"
	"strings"
)

// The bodies of the API. Their field names are gvproxy's, the capitals of zones among them.
type (
	exposeBody struct {
		Local    string `json:"local"`
		Remote   string `json:"remote"`
		Protocol Proto  `json:"protocol"`
	}
	unexposeBody struct {
		Local    string `json:"local"`
		Protocol Proto  `json:"protocol"`
	}
	zoneBody struct {
		Name      string
		Records   []recordBody // nil is written as null
		DefaultIP net.IP       // nil is written as ""
	}
	recordBody struct {
		Name   string
		IP     net.IP
		Regexp *regexp.Regexp `json:",omitempty"`
	}
)

func key(proto Proto, local string) Key {
	if proto == "" {
		proto = TCP
	}
	return Key{proto, local}
}

func forwardBodies(forwards []Forward) []exposeBody {
	bodies := make([]exposeBody, len(forwards))
	for i, f := range forwards {
		bodies[i] = exposeBody{f.Local, f.Remote, f.Proto}
	}
	slices.SortFunc(bodies, func(a, b exposeBody) int {
		if c := strings.Compare(a.Local, b.Local); c != 0 {
			return c
		}
		return strings.Compare(string(a.Protocol), string(b.Protocol))
	})
	return bodies
}

func zoneBodies(zones []Zone) []zoneBody {
	if zones == nil {
		return nil // null in JSON, as in gvproxy
	}
	bodies := make([]zoneBody, len(zones))
	for i, z := range zones {
		bodies[i] = zoneBody{Name: z.Name, DefaultIP: z.Default.AsSlice()}
		if z.Records == nil {
			continue
		}
		bodies[i].Records = make([]recordBody, len(z.Records))
		for j, r := range z.Records {
			bodies[i].Records[j] = recordBody{r.Name, r.Addr.AsSlice(), r.Pattern}
		}
	}
	return bodies
}

func zoneValue(b zoneBody) Zone {
	z := Zone{Name: b.Name, Default: addrOf(b.DefaultIP)}
	if b.Records != nil {
		z.Records = make([]Record, len(b.Records))
	}
	for i, r := range b.Records {
		z.Records[i] = Record{r.Name, r.Regexp, addrOf(r.IP)}
	}
	return z
}

func addrOf(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}

func leaseBodies(leases map[netip.Addr]MAC) map[string]string {
	bodies := make(map[string]string, len(leases))
	for addr, mac := range leases {
		bodies[addr.String()] = mac.String()
	}
	return bodies
}

func camBodies(cam map[MAC]int) map[string]int {
	bodies := make(map[string]int, len(cam))
	for mac, conn := range cam {
		bodies[mac.String()] = conn
	}
	return bodies
}

// Stats are the counters of a gateway.
type Stats struct {
	BytesSent     uint64 // to the VMs, of frames
	BytesReceived uint64 // from them
	Counters      any    // a struct of structs and counters, such as netstack's tcpip.Stats; nil: none
}

// counter is what netstack's counters are.
type counter interface{ Value() uint64 }

func statsBody(s Stats) map[string]any {
	body := make(map[string]any)
	if s.Counters != nil {
		collect(body, reflect.Indirect(reflect.ValueOf(s.Counters)))
	}
	body["BytesSent"], body["BytesReceived"] = s.BytesSent, s.BytesReceived
	return body
}

// collect puts the counters of a struct into body by the names of their fields, and those of its structs one level deeper.
func collect(body map[string]any, v reflect.Value) {
	for i := range v.NumField() {
		field, value := v.Type().Field(i), v.Field(i)
		if !field.IsExported() {
			continue
		}
		if value.Kind() == reflect.Struct {
			inner := make(map[string]any)
			body[field.Name] = inner
			collect(inner, value)
			continue
		}
		if c, ok := value.Interface().(counter); ok && !value.IsZero() {
			body[field.Name] = c.Value()
		}
	}
}
