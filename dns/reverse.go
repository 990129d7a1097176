package dns

import (
	"net/netip"
	"strconv"
	"strings"
)

// The zones of reverse names: RFC 1035 section 3.5 and RFC 3596 section 2.5.
const (
	reverse4 = ".in-addr.arpa."
	reverse6 = ".ip6.arpa."
)

// parseReverse reads a reverse name: the addresses that it stands for, all of those below it, and whether it is
// exactly one. A name with something else before the digits stands for what the digits say and is not exact. A name
// outside of the reverse zones, or at their top, is none.
func parseReverse(name string) (p netip.Prefix, exact, ok bool) {
	if digits, ok := strings.CutSuffix(name, reverse4); ok {
		var a [4]byte
		n, rest := reverseDigits(digits, len(a), func(i int, label string) bool {
			v, err := strconv.ParseUint(label, 10, 8)
			a[i] = byte(v)
			return err == nil && (label == "0" || label[0] != '0')
		})
		return netip.PrefixFrom(netip.AddrFrom4(a), 8*n).Masked(), n == len(a) && rest == "", n > 0
	}
	if digits, ok := strings.CutSuffix(name, reverse6); ok {
		var a [16]byte
		n, rest := reverseDigits(digits, 2*len(a), func(i int, label string) bool {
			v, err := strconv.ParseUint(label, 16, 4)
			a[i/2] |= byte(v) << (4 * (1 - i%2))
			return err == nil && len(label) == 1
		})
		return netip.PrefixFrom(netip.AddrFrom16(a), 4*n).Masked(), n == 2*len(a) && rest == "", n > 0
	}
	return netip.Prefix{}, false, false
}

// reverseDigits gives set the labels of s from the right, at most limit of them, until one does not please it. It
// returns how many did and what of s remained.
func reverseDigits(s string, limit int, set func(i int, label string) bool) (n int, rest string) {
	for ; s != "" && n < limit; n++ {
		label := s[strings.LastIndexByte(s, '.')+1:]
		if !set(n, label) {
			break
		}
		s = strings.TrimSuffix(s[:len(s)-len(label)], ".")
	}
	return n, s
}
